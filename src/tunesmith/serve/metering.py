"""What `/metrics` tells Prometheus. Each server has its own registry."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .asking import Piece, Question
from .engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meter:
    """Counters of one server, and its engine's state at the time of reading."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "tunesmith"}
        self.requests = Counter("requests", "Answered HTTP requests.", ["method", "route", "status"], **own)
        self.seconds = Histogram("request_seconds", "Time of a request.", ["route"], buckets=SECONDS, **own)
        self.first = Histogram("first_token_seconds", "Time to the first token.", ["model"], buckets=SECONDS, **own)
        self.prompt = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **own)
        self.drawn = Counter("completion_tokens", "Tokens drawn.", ["model"], **own)
        self.ended = Counter("answers", "Answers that ended, by why.", ["model", "reason"], **own)
        Gauge("rows_live", "Answers under way.", **own).set_function(lambda: len(engine.live.rows))
        Gauge("rows_waiting", "Answers in the queue.", **own).set_function(lambda: len(engine.waiting))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    async def count(self, pieces: AsyncGenerator[Piece, None], question: Question) -> AsyncGenerator[Piece, None]:
        """The same pieces, counted as they pass."""
        name, started, first = question.served.name, time.monotonic(), True
        self.prompt.labels(name).inc(question.prompt_tokens)
        try:
            async for piece in pieces:
                if first:
                    self.first.labels(name).observe(time.monotonic() - started)
                    first = False
                self.drawn.labels(name).inc()
                if piece.reason:
                    self.ended.labels(name, piece.reason).inc()
                yield piece
        finally:
            await pieces.aclose()


def metered(app: ASGIApp, meter: Meter) -> ASGIApp:
    """`app`, whose answers are counted by the route that gave them; a path of the client's own makes no new label."""

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, note)
        finally:
            route = scope.get("route")
            path, method = (route.path, scope["method"]) if isinstance(route, Route) else ("none", "any")
            meter.requests.labels(method, path, str(status)).inc()
            meter.seconds.labels(path).observe(time.monotonic() - started)

    return count
