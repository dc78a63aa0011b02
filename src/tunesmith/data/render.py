"""Conversations become tokens and weights, through the model's own chat template.

Train what is served: each trained answer's context is, token for token, what the server sends for the same turns. The
answer and its end of turn are trained, nothing else. Turns of one conversation share an Example as long as that holds;
where a template rewrites earlier turns, the later answer gets an Example of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..types import Conversation, Example, Message
from .layout import as_dict


def prompt_tokens(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, object]] = ()
) -> list[int]:
    """What the model is served for these turns: template, then the opening of the assistant's turn."""
    return encode(tokenizer, _text(messages, tokenizer, tools, opens=True))


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[Example]:
    """Examples of one conversation. Raises DataError naming the row when the template cannot hold it."""
    if not conversation.messages:
        return [_plain_text(conversation, tokenizer, eos_ids)]
    examples: list[Example] = []
    tokens: list[int] = []
    weights: list[float] = []
    for turn, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        before = _turns(conversation, turn, tokenizer, opens=True)
        context = encode(tokenizer, before)
        answer = _answer(conversation, turn, before, tokenizer, eos_ids)
        if context[: len(tokens)] != tokens:
            examples.append(_example(tokens, weights, conversation, len(examples)))
            tokens, weights = [], []
        weights += [0.0] * (len(context) - len(tokens)) + [1.0] * len(answer)
        tokens = context + answer
    return [*examples, _example(tokens, weights, conversation, len(examples))]


def render_last(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> Example:
    """The conversation with its last answer as the only trained one. Raises DataError as render does."""
    example = render(conversation, tokenizer, eos_ids)[-1]
    last = int(np.flatnonzero(example.weights == 0)[-1])
    weights = np.where(np.arange(len(example.weights)) > last, example.weights, 0).astype(np.float32)
    return replace(example, weights=weights)


def _turns(conversation: Conversation, count: int, tokenizer: PreTrainedTokenizerBase, *, opens: bool) -> str:
    try:
        return _text(conversation.messages[:count], tokenizer, conversation.tools, opens=opens)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise DataError(
            f"the chat template cannot render this row: {error}",
            where=conversation.source,
            fix="Change the row's roles, or use a base model whose template knows them.",
        ) from None


def _answer(
    conversation: Conversation, turn: int, before: str, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> list[int]:
    """Ids of the answer that follows `before`, up to and with its end, which is added where the template has none."""
    after = _turns(conversation, turn + 1, tokenizer, opens=False)
    if not after.startswith(before):
        raise DataError(
            "the chat template writes the answer elsewhere than where the model would be asked for it",
            where=conversation.source,
            fix="Use a base model whose template ends the prompt where the answer begins.",
        )
    _refuse_early_end(conversation, turn, tokenizer, eos_ids)
    ids = encode(tokenizer, after[len(before) :])
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    return [*ids, eos_ids[0]] if end is None else ids[: end + 1]


def _refuse_early_end(
    conversation: Conversation, turn: int, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> None:
    """An answer that spells the end of turn would be cut there, in training and in every served answer."""
    message = conversation.messages[turn]
    written = message.content + json.dumps([dict(call) for call in message.tool_calls], ensure_ascii=False)
    spelled = _spellings(tokenizer, tuple(eos_ids))
    if spelled and not any(text in written for text in spelled):
        return
    inside = [token for token in encode(tokenizer, written) if token in eos_ids]
    if inside:
        raise DataError(
            f"an answer holds {tokenizer.decode(inside[:1])!r}, which ends the model's turn",
            where=conversation.source,
            fix="Remove or respell these characters: the model could never write what follows them.",
        )


@lru_cache(maxsize=4)
def _spellings(tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> tuple[str, ...]:
    """How the ends of turn are written, where nothing else gives their ids; empty where other text could."""
    if tokenizer.unk_token_id in eos_ids:
        return ()
    added = tokenizer.added_tokens_decoder
    known = [added[token] for token in eos_ids if token in added and not added[token].normalized]
    return tuple(token.content for token in known) if len(known) == len(eos_ids) else ()


def _plain_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> Example:
    tokens = [*encode(tokenizer, conversation.text), eos_ids[0]]
    return _example(tokens, [0.0] + [1.0] * (len(tokens) - 1), conversation, 0)


def _example(tokens: list[int], weights: list[float], conversation: Conversation, part: int) -> Example:
    return Example(
        tokens=np.asarray(tokens, dtype=np.int64),
        weights=np.asarray(weights, dtype=np.float32),
        id=conversation.id if part == 0 else f"{conversation.id}/{part}",
    )


def _text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, object]],
    *,
    opens: bool,
) -> str:
    text = tokenizer.apply_chat_template(
        [as_dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,  # type: ignore[arg-type]
        add_generation_prompt=opens,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as it stands; tokens that it spells out are those tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]
