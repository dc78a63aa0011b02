"""Answers in the shape of OpenAI's API: whole, or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .asking import Piece, Question
from .problems import Problem, error_body
from .words import HALF, Word

LEAST_LOG_PROB = -9999.0  # OpenAI's number for what is next to impossible; JSON has no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a reply is written: the kind of request, whether with log-probabilities, whether a stream ends with usage."""

    chat: bool
    words: bool
    usage: bool = False


@dataclass(slots=True)
class _Choice:
    text: str = ""
    words: list[Word] = field(default_factory=list)
    reason: str | None = None
    drawn: int = 0


async def whole(
    pieces: AsyncIterator[Piece], question: Question, shape: Shape, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The reply when all choices have ended."""
    choices = [_Choice() for _ in question.rows]
    async for piece in pieces:
        choice = choices[piece.index]
        choice.text += piece.said.text
        choice.words += piece.said.words
        choice.reason = piece.reason
        choice.drawn += 1
    listed = []
    for index, choice in enumerate(choices):
        said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        one = {"index": index, **(said if shape.chat else {"text": choice.text})}
        words = _words(choice.words, shape, tokenizer) if shape.words else None
        listed.append({**one, "logprobs": words, "finish_reason": choice.reason})
    usage = _usage(question, sum(choice.drawn for choice in choices))
    return {**_frame(question, shape, chunk=False), "choices": listed, "usage": usage}


async def streamed(
    pieces: AsyncGenerator[Piece, None], question: Question, shape: Shape, tokenizer: PreTrainedTokenizerBase
) -> AsyncGenerator[str, None]:
    """The reply piece by piece, as events. A failure on the way is an event too."""
    frame, drawn = _frame(question, shape, chunk=True), 0
    usage = {"usage": None} if shape.usage else {}

    def event(index: int, text: str, words: Any = None, reason: str | None = None, **first: str) -> str:
        said = {"delta": {**first, **({"content": text} if text or first else {})}} if shape.chat else {"text": text}
        choice = {"index": index, **said, "logprobs": words, "finish_reason": reason}
        return _event({**frame, "choices": [choice], **usage})

    try:
        if shape.chat:
            for index in range(len(question.rows)):
                yield event(index, "", role="assistant")
        async for piece in pieces:
            drawn += 1
            said = piece.said
            words = _words(said.words, shape, tokenizer) if shape.words and said.words else None
            if said.text or words:
                yield event(piece.index, said.text, words)
            if piece.reason:
                yield event(piece.index, "", reason=piece.reason)
        if shape.usage:
            yield _event({**frame, "choices": [], "usage": _usage(question, drawn)})
    except Problem as problem:
        yield _event(error_body(problem.status, problem.message, problem.param, problem.code))
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _frame(question: Question, shape: Shape, *, chunk: bool) -> dict[str, Any]:
    """What every object of a reply carries."""
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if shape.chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if shape.chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": question.served.name,
        "system_fingerprint": None,
    }


def _usage(question: Question, drawn: int) -> dict[str, int]:
    asked = question.prompt_tokens
    return {"prompt_tokens": asked, "completion_tokens": drawn, "total_tokens": asked + drawn}


def _words(words: Sequence[Word], shape: Shape, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Log-probabilities as chat or as plain completions list them."""
    if shape.chat:
        content = [
            {**_one(word.token, word.log_prob, tokenizer), "top_logprobs": [_one(*r, tokenizer) for r in word.rivals]}
            for word in words
        ]
        return {"content": content, "refusal": None}
    texts = [_text(word.token, tokenizer) for word in words]
    # Halves of characters are spelled alike, and the likeliest, which comes last here, stays.
    rivals = [{_text(t, tokenizer): _finite(log_prob) for t, log_prob in word.rivals[::-1]} for word in words]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(word.log_prob) for word in words],
        "top_logprobs": rivals,
        "text_offset": [word.start for word in words],
    }


def _one(token: int, log_prob: float, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A token with its bytes; none where its bytes are not whole characters, which text cannot tell."""
    text = _text(token, tokenizer)
    known = None if HALF in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": _finite(log_prob), "bytes": known}


def _text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([token]))


def _finite(log_prob: float) -> float:
    return max(log_prob, LEAST_LOG_PROB)
