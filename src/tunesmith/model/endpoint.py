"""Answers from an OpenAI-compatible endpoint: a few at a time, no faster than allowed, until all have a reply.

What may pass by itself is tried again: 429, 5xx, timeouts, broken connections and bodies, after the time that the
server names in Retry-After, else after 1, 2, 4 ... seconds. What will not pass (a wrong key, an unknown model, an
address where nobody was ever there) stops the whole collection; what the server refuses of one question (400, a content
filter) is that question's reply. The key goes into one header and nowhere else: not into messages, files or logs.
"""

from __future__ import annotations

import email.utils
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ..errors import ModelError, RecipeError
from ..types import Message, Stop

MOST_BYTES = 16 << 20
LONGEST_WAIT_SECONDS = 600.0
CONNECT_SECONDS = 20.0  # whoever has not taken the connection by then is not there
_PASSING = {408, 409, 425, 429, *range(500, 600)}
_REFUSALS = {400, 413, 422}
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the teacher is asked; `id` is a hash of all that decides the answer, `seed` tells samples apart."""

    id: str
    messages: tuple[Message, ...]
    temperature: float
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, or why there is none; tokens are as the teacher counts them, None where it does not say."""

    text: str
    stop: Stop = "end_of_turn"
    refusal: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask and how hard; `url` ends in /v1. `key_name` is the environment variable that holds the key."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    key_name: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    parallel: int = 4
    tries: int = 7
    first_wait_seconds: float = 1.0
    timeout_seconds: float = 180.0

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, where nobody sends a bill."""
        return urlsplit(self.url).hostname in _LOOPBACK


class _Later(Exception):
    """It may pass, after `seconds` if the server says so; with `everyone` nobody may start before that.

    With `nobody` there was no connection.
    """

    def __init__(
        self, reason: str, seconds: float | None = None, *, everyone: bool = False, nobody: bool = False
    ) -> None:
        self.reason, self.seconds, self.everyone, self.nobody = reason, seconds, everyone, nobody
        super().__init__(reason)


class _Pace:
    """Requests start at least a gap apart, whichever thread sends them; all hold where the server asks for it."""

    def __init__(self, per_minute: float | None) -> None:
        self.stop = threading.Event()
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def turn(self) -> None:
        """Wait for this request's time; at once if everything stops."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        self.stop.wait(at - now)

    def hold(self, seconds: float) -> None:
        """Nobody starts before `seconds` have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class _Line:
    """What all threads know of the connection: whether there ever was one, and whether its loss was told."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.reached = False
        self._say, self._told, self._lock = say, False, threading.Lock()

    def works(self) -> None:
        """An answer came."""
        with self._lock:
            self.reached, self._told = True, False

    def fails(self, later: _Later) -> None:
        """Tell it, once until the next answer. Being asked to wait is no failure."""
        with self._lock:
            self.reached = self.reached or not later.nobody
            first, self._told = not (self._told or later.everyone), self._told or not later.everyone
        if first:
            self._say(f"teacher does not answer ({later.reason}); trying again")


def check_url(url: str) -> None:
    """Raises RecipeError for an address that is none, or that holds a secret."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        fix = "Give the plain address, and the key in the environment variable that task.teacher.key_env names."
        raise RecipeError("the address holds a name, a password or a query", where="task.teacher.by", fix=fix)
    if not parts.hostname or not parts.path.rstrip("/").endswith("/v1"):
        fix = "Give the part before /chat/completions, such as http://127.0.0.1:8000/v1."
        raise RecipeError(f"{url} does not end in /v1", where="task.teacher.by", fix=fix)


def answer_all(
    endpoint: Endpoint,
    questions: Sequence[Question],
    keep: Callable[[Question, Reply], None],
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Ask every question; each reply is handed to `keep`, one at a time, as soon as it is there; `say` tells the user.

    Raises ModelError where the teacher cannot be reached or will not answer. Whatever ends it early, questions under
    way are waited for and kept: they have been paid for.
    """
    if not questions:
        return
    pace, line, writing = _Pace(endpoint.requests_per_minute), _Line(say), threading.Lock()
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}

    timeout = httpx2.Timeout(endpoint.timeout_seconds, connect=min(CONNECT_SECONDS, endpoint.timeout_seconds))
    with httpx2.Client(headers=headers, timeout=timeout) as client:

        def one(question: Question) -> None:
            try:
                reply = _until_answered(client, endpoint, question, pace, line)
                if reply:
                    with writing:
                        keep(question, reply)
            except BaseException:
                pace.stop.set()  # here, before this thread takes the next question
                raise

        one(questions[0])  # alone, so that a wrong key or address is told once
        with ThreadPoolExecutor(endpoint.parallel) as pool:
            futures = [pool.submit(one, question) for question in questions[1:]]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pace.stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _until_answered(
    client: httpx2.Client, endpoint: Endpoint, question: Question, pace: _Pace, line: _Line
) -> Reply | None:
    """The reply, after as many tries as it takes; None where everything stops before it is there."""
    reason, fix = "not asked", ""
    for attempt in range(endpoint.tries):
        pace.turn()
        if pace.stop.is_set():
            return None
        try:
            reply = _ask(client, endpoint, question)
            line.works()
            return reply
        except _Later as later:
            reason, fix, wait = later.reason, _what_to_do(later), later.seconds
            if later.nobody and not line.reached:
                fix = "Start the server or mend task.teacher.by."
                raise ModelError(f"the teacher cannot be reached ({reason})", where=endpoint.url, fix=fix) from None
            if wait is None:
                wait = endpoint.first_wait_seconds * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311, no secret
            if wait > LONGEST_WAIT_SECONDS:
                reason = f"{reason}; it asks to come back in {wait:.0f} s"
                break
            if attempt + 1 < endpoint.tries:
                line.fails(later)
            if later.everyone:
                pace.hold(wait)
            elif attempt + 1 < endpoint.tries:
                pace.stop.wait(wait)
    raise ModelError(f"the teacher does not answer ({reason})", where=endpoint.url, fix=fix)


def _what_to_do(later: _Later) -> str:
    if later.nobody:
        return "Start the server again and run the same command to go on: answers so far are kept."
    return "Answers so far are kept: run the same command to go on, or lower task.teacher.requests_per_minute."


def _ask(client: httpx2.Client, endpoint: Endpoint, question: Question) -> Reply:
    """One request. Raises _Later or ModelError."""
    # OpenAI's own newer models know this name only, everybody else's servers the older one only.
    limit = "max_completion_tokens" if urlsplit(endpoint.url).hostname == "api.openai.com" else "max_tokens"
    body = {
        "model": endpoint.model,
        "messages": [{"role": message.role, "content": message.content} for message in question.messages],
        "temperature": question.temperature,
        limit: question.max_new_tokens,
        **({"seed": question.seed} if question.temperature else {}),
    }
    start = time.monotonic()
    url, content = f"{endpoint.url.rstrip('/')}/chat/completions", bytearray()
    try:
        with client.stream("POST", url, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                # A timeout of the connection alone would let a server drip for ever.
                if len(content) > MOST_BYTES or time.monotonic() - start > endpoint.timeout_seconds:
                    raise _Later("the answer is too long or too slow")
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        said = _clean(str(error), endpoint) or type(error).__name__
        nobody = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        # "[Errno 111] Connection refused", with another number on another system
        raise _Later("connection refused" if nobody and "refused" in said else said, nobody=nobody) from None
    if response.status_code == 200:
        return _reply(bytes(content), time.monotonic() - start)
    return _no_reply(response, bytes(content), endpoint)


def _reply(content: bytes, seconds: float) -> Reply:
    """The reply in a body of status 200. Raises _Later for one that is not as it should be."""
    try:
        body: Any = json.loads(content)
        choice = body["choices"][0]
        message, why = choice["message"], choice.get("finish_reason")
        text, usage = message.get("content"), body.get("usage") or {}
        counts = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
        read, written = (None if count is None else int(count) for count in counts)
        if why == "content_filter" or message.get("refusal") or not isinstance(text, str):
            refusal = str(message.get("refusal") or why or "no text")[:200]
            return Reply(text="", refusal=refusal, prompt_tokens=read, completion_tokens=written, seconds=seconds)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Later("a body that is no chat completion") from None
    stop: Stop = "length" if why == "length" else "end_of_turn"
    return Reply(text=text, stop=stop, prompt_tokens=read, completion_tokens=written, seconds=seconds)


def _no_reply(response: httpx2.Response, content: bytes, endpoint: Endpoint) -> Reply:
    """A refusal as a reply. Raises _Later or ModelError for every other status."""
    status, (said, code) = response.status_code, _message(content, endpoint)
    told = f"{status}: {said}" if said else str(status)
    if status in _REFUSALS:
        return Reply(text="", refusal=told)
    if status in (401, 403):
        what = "does not accept the key" if endpoint.key else "wants a key"
        fix = f"Set the environment variable {endpoint.key_name} (task.teacher.key_env names it) to a valid key."
        raise ModelError(f"the teacher {what} ({status})", where=endpoint.url, fix=fix)
    if status in _PASSING and code != "insufficient_quota":
        raise _Later(told, _retry_after(response.headers.get("retry-after", "")), everyone=status in (429, 503))
    fix = "Check task.teacher.by, task.teacher.model and the account; answers so far are kept."
    raise ModelError(f"the teacher does not answer ({told})", where=endpoint.url, fix=fix)


def _message(content: bytes, endpoint: Endpoint) -> tuple[str, str]:
    """What an error's body says, shortened and without the key, and its code."""
    error: Any = None
    with suppress(ValueError, RecursionError):
        error = json.loads(content)
        error = error.get("error", error) if isinstance(error, dict) else error
    said = error.get("message", "") if isinstance(error, dict) else error if isinstance(error, str) else ""
    return _clean(str(said), endpoint), str(error.get("code", "")) if isinstance(error, dict) else ""


def _clean(text: str, endpoint: Endpoint) -> str:
    """One short line without the key."""
    return " ".join((text.replace(endpoint.key, "***") if endpoint.key else text).split())[:200]


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None where there is none."""
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None
