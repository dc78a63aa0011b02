"""What stands before a server's routes, all of them: who may call, and how much they may send.

A page on the web can make a browser send requests to 127.0.0.1, and by rebinding its name even read the answers. Such
requests carry that page's name in Host or Origin, so both are checked. There is no CORS. Where there is a key, it is
asked for on every path but the public ones, before anything looks at the request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 16 * 1024
READING = ("GET", "HEAD")
JSON, FORM = "application/json", "multipart/form-data"


def plain_body(status: int, problem: str) -> dict[str, object]:
    """What a refusal says, unless a Gate says it otherwise."""
    return {"error": problem}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Who may pass. `hosts` are the names that a Host header may have; `any_address` lets IP addresses pass too, which
    no page can rebind. `key`, if there is one, is asked for on all paths but the `public` ones.
    """

    policy: str
    hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost"})
    any_address: bool = False
    key: str = ""
    public: frozenset[str] = frozenset()
    uploads: frozenset[str] = frozenset()
    most_body_bytes: int = MOST_BODY_BYTES
    body: Callable[[int, str], dict[str, object]] = plain_body


def guarded(app: ASGIApp, gate: Gate) -> ASGIApp:
    """`app` behind a Gate; every answer carries its Content-Security-Policy, unless the route gave one."""
    headers = {
        "content-security-policy": gate.policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = MutableHeaders(scope=message)
                for name, value in headers.items():
                    given.setdefault(name, value)
            await send(message)

        path, sent = scope["path"], Headers(scope=scope)
        status, problem = refusal(scope["method"], path, sent, gate, scope["query_string"])
        if not problem and path in gate.uploads and _kind(sent) == FORM:
            await app(scope, receive, send_with_headers)
            return
        body = b"" if problem or scope["method"] in READING else await _small_body(receive, gate.most_body_bytes)
        if body is None:
            status, problem = 413, f"the body is larger than {gate.most_body_bytes} bytes"
        if problem:
            ask = {"www-authenticate": "Bearer"} if status == 401 else None
            await JSONResponse(gate.body(status, problem), status, ask)(scope, receive, send_with_headers)
            return
        await app(scope, _replayed(body or b"", receive), send_with_headers)

    return guard


def ticket(key: str, path: str) -> str:
    """What a link to `path` bears, as `?ticket=`, so that a browser may read it without the key."""
    return hmac.new(key.encode("utf-8"), path.encode("utf-8"), hashlib.sha256).hexdigest()[:32] if key else ""


def refusal(method: str, path: str, headers: Headers, gate: Gate, query: bytes = b"") -> tuple[int, str]:
    """The status and the reason for refusing a request by its headers; (200, "") for one that may pass."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or not _is_known(hosts[0], gate):
        return 421, f"this server answers to {' and '.join(sorted(gate.hosts))} only"
    own = [[f"http://{hosts[0]}"], [f"https://{hosts[0]}"]][
        : 2 if gate.key else 1
    ]  # with a key, TLS may stand before us
    if origins and origins not in own:
        return 403, "only the page of this server may call it"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and method not in READING:
        return 403, "only the page of this server may call it"
    ticketed = method in READING and hmac.compare_digest(query, b"ticket=" + ticket(gate.key, path).encode("ascii"))
    if gate.key and path not in gate.public and not ticketed and not _knows(headers.getlist("authorization"), gate.key):
        return 401, "this server needs its key, as Authorization: Bearer KEY"
    wanted = {JSON, FORM} if path in gate.uploads else {JSON}
    empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if method not in READING and not empty and _kind(headers) not in wanted:
        return 415, "send JSON, with content-type application/json"
    return 200, ""


def content_policy(page: str) -> str:
    """A Content-Security-Policy that allows a page's own inline style and script, and calls to its server; no more."""
    styles, scripts = (re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
    allowed = {"style-src": styles, "script-src": scripts}
    own = "; ".join(f"{name} {' '.join(map(_hash, parts))}" for name, parts in allowed.items())
    return (
        f"default-src 'none'; {own}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _kind(headers: Headers) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _is_known(host: str, gate: Gate) -> bool:
    """Whether a Host header names this server; the port may be another one, where it is forwarded."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?", host, re.IGNORECASE | re.ASCII)
    if not found:
        return False
    name = found[1].lower()
    return name in gate.hosts or (gate.any_address and _is_address(name.strip("[]")))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _knows(given: list[str], key: str) -> bool:
    """Whether the one Authorization header bears the key; takes as long for a nearly right one as for any other."""
    scheme, _, word = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    same = hmac.compare_digest(word.strip().encode("utf-8"), key.encode("utf-8"))
    return same and scheme.lower() == "bearer"


async def _small_body(receive: Receive, most_bytes: int) -> bytes | None:
    """The whole body, or None where it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most_bytes:
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out a body that was read already, then goes on."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again
