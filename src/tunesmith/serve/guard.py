"""What stands before a local page: only this machine's own pages may call it, with small bodies of JSON.

A page on the web can make a browser send requests to 127.0.0.1, and by rebinding its name even read the answers. Such
requests carry that page's name in Host or Origin, so both are checked. There is no CORS.
"""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 16 * 1024
READING = ("GET", "HEAD")


def guarded(app: ASGIApp, policy: str) -> ASGIApp:
    """`app` behind these checks; every answer carries the Content-Security-Policy `policy`."""
    headers = {
        "content-security-policy": policy,
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
                MutableHeaders(scope=message).update(headers)
            await send(message)

        status, problem = refusal(scope["method"], Headers(scope=scope))
        body = b"" if problem or scope["method"] in READING else await _small_body(receive)
        if body is None:
            status, problem = 413, f"the body is larger than {MOST_BODY_BYTES} bytes"
        if problem:
            await JSONResponse({"error": problem}, status)(scope, receive, send_with_headers)
            return
        await app(scope, _replayed(body or b"", receive), send_with_headers)

    return guard


def refusal(method: str, headers: Headers) -> tuple[int, str]:
    """The status and the reason for refusing a request by its headers; (200, "") for one that may pass."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or not _is_loopback(hosts[0]):
        return 421, "this server answers to 127.0.0.1 and localhost only"
    if origins and origins != [f"http://{hosts[0]}"]:
        return 403, "only the page of this server may call it"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and method not in READING:
        return 403, "only the page of this server may call it"
    if method not in READING and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
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


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine; the port may be another one, where it is forwarded."""
    return re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", host, re.IGNORECASE | re.ASCII) is not None


async def _small_body(receive: Receive) -> bytes | None:
    """The whole body, or None where it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
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
