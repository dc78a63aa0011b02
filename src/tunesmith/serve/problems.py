"""Everything that a client may hear instead of an answer, in the shape of OpenAI's errors."""

from __future__ import annotations

import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import TunesmithError
from ..folder import FULL

RETRY_SECONDS = 1
STORAGE_FULL = 507
OF_JOBS = ("/jobs", "/v1/files", "/v1/fine_tuning")  # paths of a server that was started with --jobs
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 429: "queue_full"}


class Problem(Exception):
    """A request that is not answered: status, what is wrong, which field, and a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """`{"error": {...}}` as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def say_problems(app: FastAPI) -> None:
    """Turn everything that is raised while a request is read into such a body."""

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return answer(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        if first["type"] == "json_invalid":
            return answer(400, "the body is not JSON", None, "invalid_json")
        unknown = first["type"] == "extra_forbidden"
        what = "is not a field that this server knows" if unknown else first["msg"]  # never what was sent
        message = f"{'.'.join(place) or 'the body'}: {what}"
        return answer(400, message, place[0] if place else None, "unknown_parameter" if unknown else "invalid_value")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        nowhere = "there is nothing at this path; the API is under /v1"
        if request.url.path.startswith(OF_JOBS):
            nowhere = "there is nothing at this path; fine-tuning jobs are taken by `tunesmith serve BASE --jobs DIR`"
        said = answer(error.status_code, nowhere if error.status_code == 404 else str(error.detail).lower())
        said.headers.update(error.headers or {})  # which verbs a path knows
        return said

    @app.exception_handler(sqlite3.Error)
    async def unsaved(_: Request, error: sqlite3.Error) -> JSONResponse:
        return answer(STORAGE_FULL, f"not saved: {error}; look at the disk's space and permissions")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(500, f"{type(error).__name__}; the server's log has more")

    @app.exception_handler(TunesmithError)
    async def expected(_: Request, error: TunesmithError) -> JSONResponse:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        said = " ".join(part for part in (f"{error.what}.", error.fix) if part)
        return answer(STORAGE_FULL if full else 400, said, error.where or None)


def answer(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """The response; one that a client may repeat says when."""
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 429 else None
    return JSONResponse(error_body(status, message, param, code), status, headers)
