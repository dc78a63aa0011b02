"""The label page's server: a page, the next pair, a choice, an undo. All state is in the store.

    GET  /                  the page
    GET  /api/about         what is labelled, and the rater's name where the command gave one
    GET  /api/state?rater=  the next pair, how many are done, and which choice an undo would take back
    POST /api/choices       one choice; the same id twice counts once
    POST /api/undo          take back the last choice

A choice or an undo is answered with the next state, after it is on the disk. Every error is JSON, {"error", "fix"}.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ..types import Message
from .choices import Choice, ConflictError, Pick, add_choice, last_choice, read_choices, read_pairs, undo_choice
from .guard import Gate, content_policy, guarded
from .turns import EVERYTHING, RaterName, Sharing, left_side, showings, waiting

PAGE = Path(__file__).parent / "static" / "label.html"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ChoiceBody(_Body):
    """What the page sends when a rater has chosen."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f-]{36}$")]
    rater: RaterName
    pair: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    repeat: bool
    pick: Pick
    seconds: Annotated[float, Field(ge=0, le=1e6)]


class UndoBody(_Body):
    """Which choice to take back."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f-]{36}$")]
    rater: RaterName


def label_app(store: sqlite3.Connection, name: str, rater: str = "", sharing: Sharing = EVERYTHING) -> FastAPI:
    """The server's application over an open store that nobody else in this process uses."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page, pairs, one_at_a_time = PAGE.read_text(encoding="utf-8"), read_pairs(store), Lock()
    app.add_middleware(guarded, gate=Gate(policy=content_policy(page)))
    _say_errors_in_json(app)

    def state(rater: str) -> dict[str, Any]:
        """What the page shows this rater next."""
        choices = read_choices(store)
        plan = showings(rater, pairs, choices, sharing)
        left = waiting(rater, plan, choices)
        task = None
        if left:
            pair, showing = pairs[left[0].pair], left[0]
            sides = (pair.a, pair.b) if showing.left == "a" else (pair.b, pair.a)
            task = {
                "pair": showing.pair,
                "repeat": showing.repeat,
                "prompt": [{"role": turn.role, "text": shown(turn)} for turn in pair.prompt],
                "left": shown(sides[0]),
                "right": shown(sides[1]),
            }
        return {"task": task, "done": len(plan) - len(left), "total": len(plan), "last": last_choice(store, rater)}

    @app.get("/")
    def front() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/api/about")
    def about() -> dict[str, str]:
        return {"name": name, "rater": rater}

    @app.get("/api/state")
    def current(rater: Annotated[RaterName, Query()]) -> dict[str, Any]:
        with one_at_a_time:
            return state(rater)

    @app.post("/api/choices")
    def choose(body: ChoiceBody) -> dict[str, Any]:
        if body.pair not in pairs:
            raise HTTPException(404, "there is no such pair")
        left = left_side(body.rater, body.pair, repeat=body.repeat)
        with one_at_a_time:
            add_choice(store, Choice(**body.model_dump(), left=left))
            return state(body.rater)

    @app.post("/api/undo")
    def undo(body: UndoBody) -> dict[str, Any]:
        with one_at_a_time:
            undo_choice(store, body.rater, body.id)
            return state(body.rater)

    return app


def shown(message: Message) -> str:
    """A turn as the rater reads it: its text, and below it the tools it calls."""
    calls = [json.dumps(dict(call), ensure_ascii=False, indent=1) for call in message.tool_calls]
    return "\n".join(part for part in (message.content, *calls) if part)


def _say_errors_in_json(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        # What was sent is not repeated: it may be anything.
        what = f"{place or 'the body'}: {str(first['msg']).removeprefix('Value error, ')}"
        return JSONResponse({"error": what, "fix": "Reload the page."}, 422)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail), "fix": "Reload the page."}, error.status_code)

    @app.exception_handler(ConflictError)
    def conflict(_: Request, error: ConflictError) -> JSONResponse:
        return JSONResponse({"error": error.what, "fix": error.fix}, 409)

    @app.exception_handler(sqlite3.Error)
    def unsaved(_: Request, error: sqlite3.Error) -> JSONResponse:
        fix = "Look at the disk's space and permissions; the page tries again."
        return JSONResponse({"error": f"not saved: {error}", "fix": fix}, 503)
