"""A request becomes rows, and what is drawn for them becomes pieces of answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import jinja2
import numpy as np

from ..data.layout import role_of, to_messages
from ..data.render import prompt_tokens, unwritten
from ..errors import DataError
from ..model.sample import Row, Sampling
from ..texts import text_tokens
from .bodies import ChatBody, CompletionBody
from .engine import Asked, BusyError, Drawn, Engine, GoneError, Tell
from .hall import Hall, Served
from .problems import Problem
from .words import Said, Speaker

COMPLETION_TOKENS = 16  # what OpenAI's completions draw unless told otherwise
COLDEST = 1e-4  # below it a softmax in float32 has one value left, and dividing by it may overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request that was understood: its rows, in the order of the choices, and where their answers end."""

    served: Served
    rows: Sequence[Row]
    stops: tuple[str, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one more token added to choice `index`; `reason` says why it is the last."""

    index: int
    said: Said
    reason: Literal["stop", "length"] | None = None


async def chat_question(body: ChatBody, hall: Hall) -> Question:
    """The turns through the model's template, as training rendered them. Raises Problem."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Problem(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    served = find_served(body.model, hall)
    if strange := [place for place, turn in enumerate(body.messages) if not role_of(turn)]:  # which is not repeated
        raise Problem(400, f"messages[{strange[0]}] has a role that is unknown", param="messages")
    tools = body.tools or [] if body.tool_choice != "none" else []
    try:
        messages = to_messages(body.messages, "messages", "")
        if missing := await asyncio.to_thread(unwritten, messages, tools, hall.model.tokenizer):
            what = f"the model's chat template writes no {missing}; write them as text in a message"
            raise Problem(400, what, param="tools" if missing == "tool definitions" else "messages")
        prompt = await asyncio.to_thread(prompt_tokens, messages, hall.model.tokenizer, tools)
    except DataError as error:
        raise Problem(400, f"the messages cannot be read as turns: {error.what}", param="messages") from None
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise Problem(400, f"the model's chat template cannot render this: {error}", param="messages") from None
    wanted = body.max_completion_tokens or body.max_tokens
    alternatives = (body.top_logprobs or 0) if body.logprobs else 0
    return _question(body, served, hall, [np.array(prompt, dtype=np.int64)], wanted, alternatives)


async def completion_question(body: CompletionBody, hall: Hall) -> Question:
    """The prompt without a template: text begins as a plain text in training does, tokens are as they stand.

    Raises Problem.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Problem(400, "best_of other than n is not supported", param="best_of")
    served, tokenizer = find_served(body.model, hall), hall.model.tokenizer
    prompts: list[list[int]] = []
    for prompt in [body.prompt] if isinstance(body.prompt, str) else body.prompt:
        match prompt:
            case str():
                prompts.append(await asyncio.to_thread(text_tokens, tokenizer, prompt))
            case list():
                prompts.append(prompt)
            case int():
                prompts = [[token for token in body.prompt if isinstance(token, int)]]
                break
    size = hall.model.head_weight.shape[0]
    if any(token >= size for prompt in prompts for token in prompt):
        raise Problem(400, f"a token is not below {size}, the size of the vocabulary", param="prompt")
    arrays = [np.array(prompt, dtype=np.int64) for prompt in prompts]
    return _question(body, served, hall, arrays, body.max_tokens or COMPLETION_TOKENS, body.logprobs or 0)


def find_served(name: str, hall: Hall) -> Served:
    """The model of that name. Raises Problem."""
    if name not in hall.served:
        raise _unknown()
    return hall.served[name]


def _unknown() -> Problem:
    what = "no model of this name is served; GET /v1/models lists those that are"
    return Problem(404, what, param="model", code="model_not_found")


def _question(
    body: ChatBody | CompletionBody,
    served: Served,
    hall: Hall,
    prompts: Sequence[np.ndarray],
    wanted: int | None,
    alternatives: int,
) -> Question:
    """Rows of n choices for each prompt. Raises Problem where one does not fit the context."""
    if any(not len(prompt) for prompt in prompts):
        raise Problem(400, "the prompt has no tokens", param="prompt")
    context, longest = hall.engine.limits.context_tokens, max(len(prompt) for prompt in prompts)
    if longest + (wanted or 1) > context:
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        what = f"this server's context is {context} tokens; the prompt has {longest}, the answer may have {wanted or 1}"
        raise Problem(400, what, param=param, code="context_length_exceeded")
    warmth = 1.0 if body.temperature is None else body.temperature
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    rows = []
    for prompt in prompts:
        for _ in range(body.n or 1):
            how = Sampling(
                max_new_tokens=wanted or context - len(prompt),
                temperature=warmth if warmth >= COLDEST else 0.0,
                top_p=body.top_p or 1.0,
                seed=seed,
            )
            rows.append(Row(prompt, how, len(rows), served.key, alternatives))
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Question(served=served, rows=rows, stops=stops, prompt_tokens=sum(map(len, prompts)))


async def answered(engine: Engine, question: Question) -> AsyncGenerator[Piece, None]:
    """A Piece for each token, as they are drawn. When the generator is closed, rows not finished free their slots.

    Raises Problem where the queue is full, the model was unloaded meanwhile, or it fails.
    """
    drawn: asyncio.Queue[tuple[int, Drawn]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    asked = [Asked(row, _teller(loop, drawn, index)) for index, row in enumerate(question.rows)]
    speakers = [Speaker(engine.model.tokenizer, question.stops) for _ in asked]
    try:
        engine.ask(*asked)
    except BusyError:
        raise busy(engine) from None
    except GoneError:
        raise _unknown() from None
    unfinished = set(range(len(asked)))
    try:
        while unfinished:
            index, one = await drawn.get()
            if index not in unfinished:
                continue
            if one.failed:
                raise Problem(500, f"no answer: {one.failed}")
            piece = _piece(index, one, speakers[index])
            if piece.reason:
                unfinished.discard(index)
                if not one.stop:
                    engine.forget(asked[index])
            yield piece
    finally:
        for index in unfinished:
            engine.forget(asked[index])


def busy(engine: Engine) -> Problem:
    """What a client hears when the queue is full."""
    return Problem(429, f"the queue of {engine.limits.waiting} answers has no room for these; try again soon")


def _teller(loop: asyncio.AbstractEventLoop, drawn: asyncio.Queue[tuple[int, Drawn]], index: int) -> Tell:
    def tell(one: Drawn) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens any more
            loop.call_soon_threadsafe(drawn.put_nowait, (index, one))

    return tell


def _piece(index: int, one: Drawn, speaker: Speaker) -> Piece:
    if one.stop == "end_of_turn":
        said = speaker.finish()
    else:
        said = speaker.say(one.token, one.log_prob, one.rivals)
        if one.stop and not speaker.stopped:
            last = speaker.finish()
            said = Said(text=said.text + last.text, words=said.words + last.words)
    if speaker.stopped or one.stop == "end_of_turn":
        return Piece(index=index, said=said, reason="stop")
    return Piece(index=index, said=said, reason="length" if one.stop else None)
