"""How the HTTP side ends: requests that it cuts off are counted, and whoever waits for one hears why."""

from __future__ import annotations

import asyncio
from typing import Literal

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import error_body

DRAIN_SECONDS = 300
IDLE_SECONDS = 75  # longer than clients and proxies keep a connection: a request sent as the server hangs up is lost
UNAVAILABLE = 503


class Server(uvicorn.Server):
    """One application on a socket. Told to stop, it takes no more and finishes what it took, for `drain_seconds`."""

    def __init__(self, app: ASGIApp, *, lifespan: Literal["on", "off"], drain_seconds: int = DRAIN_SECONDS) -> None:
        self.cut = 0
        self.drain_seconds = drain_seconds
        super().__init__(
            uvicorn.Config(
                self._counting(app),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan=lifespan,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=drain_seconds,
            )
        )

    def ended(self) -> str:
        """What became of the requests that were accepted, in words."""
        if self.force_exit:
            return "ended at once: answers under way are cut off"
        if self.cut:
            return f"cut off after {self.drain_seconds} s: {self.cut} answers that had not ended"
        return "every accepted answer was finished"

    def _counting(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose requests are cancelled only here: a client that leaves is another matter."""

        async def through(scope: Scope, receive: Receive, send: Send) -> None:
            begun = scope["type"] != "http"

            async def note(message: Message) -> None:
                nonlocal begun
                begun = True
                await send(message)

            try:
                await app(scope, receive, note)
            except asyncio.CancelledError:
                self.cut += scope["type"] == "http"
                if not begun:  # a stream is broken off, which clients notice by themselves
                    what = error_body(UNAVAILABLE, "the server was stopped before the answer ended")
                    await JSONResponse(what, UNAVAILABLE)(scope, receive, send)

        return through
