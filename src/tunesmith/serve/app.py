"""The server's application: routes in the shape of OpenAI's API over one Hall, behind one Gate.

    GET  /health                      whether it works; needs no key
    GET  /metrics                     for Prometheus
    GET  /v1/models, /v1/models/NAME
    POST /v1/chat/completions, /v1/completions
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter

Further parts of the API are routers of their own, given to `server_app`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Lifespan

from .. import __version__
from .asking import Question, answered, busy, chat_question, completion_question, find_served
from .bodies import ChatBody, CompletionBody, LoadBody, UnloadBody
from .guard import Gate, guarded
from .hall import Hall, Served
from .metering import Meter, metered
from .problems import say_problems
from .replies import Shape, streamed, whole

T = TypeVar("T")
CLIENT_LEFT = 499
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, what in {
        400: "The request asks for something wrong or unknown.",
        404: "There is no such model.",
        429: "The queue is full.",
    }.items()
}


def server_app(
    hall: Hall, gate: Gate, *, more: Sequence[APIRouter] = (), lifespan: Lifespan[FastAPI] | None = None
) -> FastAPI:
    """The application. `more` are routers served behind the same gate, `lifespan` what goes on beside them."""
    meter = Meter(hall.engine)
    app = FastAPI(title="Tunesmith", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(guarded, gate=gate)
    app.add_middleware(metered, meter=meter)
    say_problems(app)
    for router in (_state(hall, meter), _answers(hall, meter), _adapters(hall), *more):
        app.include_router(router)
    return app


def _state(hall: Hall, meter: Meter) -> APIRouter:
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, hall) for served in hall.served.values()]}

    @router.get("/v1/models/{name:path}", responses={404: ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        return _model(find_served(name, hall), hall)

    return router


def _answers(hall: Hall, meter: Meter) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = Shape(chat=True, words=bool(body.logprobs), usage=usage)
        return await reply(await chat_question(body, hall), shape, request, stream=bool(body.stream))

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = Shape(chat=False, words=body.logprobs is not None, usage=usage)
        return await reply(await completion_question(body, hall), shape, request, stream=bool(body.stream))

    async def reply(question: Question, shape: Shape, request: Request, *, stream: bool) -> Response:
        tokenizer = hall.model.tokenizer
        if not hall.engine.has_room(len(question.rows)):
            raise busy(hall.engine)  # said before a stream begins, whose status cannot change any more
        pieces = meter.count(answered(hall.engine, question), question)
        if stream:
            events = streamed(pieces, question, shape, tokenizer)
            return StreamingResponse(events, media_type="text/event-stream")
        found = await _unless_gone(request, whole(pieces, question, shape, tokenizer))
        return JSONResponse(found) if found else Response(status_code=CLIENT_LEFT)

    return router


def _adapters(hall: Hall) -> APIRouter:
    router = APIRouter(responses={400: ERRORS[400]})

    @router.post("/v1/load_lora_adapter")
    async def add(body: LoadBody) -> dict[str, Any]:
        await hall.add(Path(body.lora_path), body.lora_name)
        return _model(hall.served[body.lora_name], hall)

    @router.post("/v1/unload_lora_adapter")
    async def remove(body: UnloadBody) -> dict[str, Any]:
        hall.remove(body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}

    return router


def _model(served: Served, hall: Hall) -> dict[str, Any]:
    parent = hall.base_name if served.key else None
    facts = {"root": served.root, "parent": parent, "max_model_len": hall.engine.limits.context_tokens}
    return {"id": served.name, "object": "model", "created": served.since, "owned_by": "tunesmith", **facts}


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns; it is ended, and there is nothing, when the client leaves first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
