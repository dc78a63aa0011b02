"""Conversations become tokens and weights, through the model's own chat template.

Train what is served: each trained answer's context is, token for token, what the server sends for the same turns. The
answer and its end of turn are trained, nothing else. Turns of one conversation share an Example as long as that holds;
where a template rewrites earlier turns, the later answer gets an Example of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..texts import text_tokens
from ..types import Conversation, Example, Message
from .layout import as_dict

THOUGHTS = "<think>"


def prompt_tokens(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, object]] = ()
) -> list[int]:
    """What the model is served for these turns: template, then the opening of the assistant's turn."""
    return encode(tokenizer, _text(messages, tokenizer, tools, opens=True))


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> list[Example]:
    """Examples of one conversation. Raises DataError naming the row when the template cannot hold it."""
    if not conversation.messages:
        return [_plain_text(conversation, tokenizer, eos_ids)]
    refuse_unwritten(conversation.messages, conversation.tools, tokenizer, conversation.source)
    examples: list[Example] = []
    tokens: list[int] = []
    weights: list[float] = []
    for turn, message in enumerate(conversation.messages):
        if message.role != "assistant" or not turn:  # a greeting that opens a conversation answers nobody: context
            continue
        before = _turns(conversation, turn, tokenizer, opens=True)
        context = encode(tokenizer, before)
        answer = _answer(conversation, turn, before, context, tokenizer, eos_ids)
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> int:
    """The token that every trained answer ends with; a model may be stopped by others too."""
    turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    return int(render(Conversation(messages=turns, id="", source=""), tokenizer, eos_ids)[-1].tokens[-1])


def unwritten(
    messages: Sequence[Message], tools: Sequence[Mapping[str, object]], tokenizer: PreTrainedTokenizerBase
) -> Literal["", "tool calls", "tool definitions"]:
    """What these turns have and the chat template leaves out without a word."""
    if any(message.tool_calls for message in messages) and not _writes_calls(tokenizer, beside_tools=bool(tools)):
        return "tool calls"
    begins = bool(messages) and messages[0].role == "system"
    if tools and not _writes_tools(tokenizer, after_system=begins):
        return "tool definitions"
    return ""


def refuse_unwritten(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> None:
    """Raises DataError where the template would leave tools or calls out: a call alone would be an empty answer."""
    if missing := unwritten(messages, tools, tokenizer):
        fix = (
            "Use another base, whose template has a place for tools, or write them as text: definitions in the prompt, "
            "a call in the answer, such as a completion with JSON."
        )
        raise DataError(f"this base's chat template writes no {missing}", where=where, fix=fix)


@lru_cache(maxsize=8)
def _writes_calls(tokenizer: PreTrainedTokenizerBase, *, beside_tools: bool) -> bool:
    """Whether the template writes an assistant's calls; some bases have another one for turns with tools."""
    # Mistral's templates want an id of nine letters or digits.
    call = {"id": "abcdef123", "type": "function", "function": {"name": "kedgeree", "arguments": {"n": 1}}}
    turns = [Message(role="user", content="q"), Message(role="assistant", content="", tool_calls=(call,))]
    return _shows("kedgeree", turns, tokenizer, [_a_tool("porridge")] if beside_tools else [])


@lru_cache(maxsize=8)
def _writes_tools(tokenizer: PreTrainedTokenizerBase, *, after_system: bool) -> bool:
    """Whether the template writes definitions of tools; some do it in the system's turn, and need one."""
    turns = [Message(role="user", content="q")]
    if after_system:
        turns.insert(0, Message(role="system", content="s"))
    return _shows("kedgeree", turns, tokenizer, [_a_tool("kedgeree")])


def _a_tool(name: str) -> dict[str, object]:
    parameters = {"type": "object", "properties": {"n": {"type": "integer", "description": "n"}}, "required": ["n"]}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def _shows(
    word: str,
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, object]],
) -> bool:
    try:
        return word in _text(turns, tokenizer, tools, opens=turns[-1].role == "user")
    except (jinja2.TemplateError, TypeError, KeyError):
        return True  # it does look at them; whether it can take a row's own, rendering that row says


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
    conversation: Conversation,
    turn: int,
    before: str,
    context: list[int],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> list[int]:
    """Ids of the answer that follows `before`, whose ids are `context`, up to and with its end.

    The end is added where the template has none.
    """
    after = _turns(conversation, turn + 1, tokenizer, opens=False)
    if not after.startswith(before):
        if before.rstrip().endswith(THOUGHTS):
            raise DataError(
                f"this base thinks before every answer: its chat template ends the prompt with {THOUGHTS}",
                where=conversation.source,
                fix="Use a base that can answer without: here answers would be trained where thoughts are due.",
            )
        raise DataError(
            "the chat template writes the answer elsewhere than where the model would be asked for it",
            where=conversation.source,
            fix="Use a base model whose template ends the prompt where the answer begins. If it can think, take the "
            "thoughts (<think>) out of the answers: it is trained and asked to answer without.",
        )
    _refuse_early_end(conversation, turn, tokenizer, eos_ids)
    whole = encode(tokenizer, after) if _marks_beginnings(tokenizer) else []
    # Alone, the answer would get a mark there that it does not have behind its context.
    follows = bool(whole) and whole[: len(context)] == context
    ids = whole[len(context) :] if follows else encode(tokenizer, after[len(before) :])
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    return [*ids, eos_ids[0]] if end is None else ids[: end + 1]


@lru_cache(maxsize=4)
def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's ids depend on its standing first: SentencePiece's normaliser puts a space before it.

    Where they do not, a text is its parts' ids wherever no word is cut, and need not be encoded twice.
    """
    return encode(tokenizer, "a\nb") != encode(tokenizer, "a\n") + encode(tokenizer, "b")


def _refuse_early_end(
    conversation: Conversation, turn: int, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> None:
    """An answer that spells the end of turn would be cut there, in training and in every served answer."""
    message = conversation.messages[turn]
    written = message.content + json.dumps(as_turn(message).get("tool_calls", []), ensure_ascii=False)
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
    tokens = [*text_tokens(tokenizer, conversation.text), eos_ids[0]]
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
        [as_turn(message) for message in messages],
        tools=[dict(tool) for tool in tools] or None,  # type: ignore[arg-type]
        add_generation_prompt=opens,
        # Qwen3's template writes an empty block of thoughts before the last answer, and before the answer that it asks
        # for only when told not to think: else the block would be trained, answered and graded. Others ignore it.
        enable_thinking=False,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as it stands; tokens that it spells out are those tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def as_turn(message: Message) -> dict[str, Any]:
    """A message as chat templates want it: its calls' arguments are objects, also where the row has them in strings.

    OpenAI's API writes them so. Templates write arguments as JSON themselves (`arguments | tojson`) and would quote the
    string once more.
    """
    turn = as_dict(message)
    return {**turn, "tool_calls": [_read_call(call) for call in message.tool_calls]} if message.tool_calls else turn


def _read_call(call: Mapping[str, object]) -> dict[str, object]:
    read = dict(call)
    if isinstance(function := call.get("function"), Mapping):
        read["function"] = _read_call(function)
    if isinstance(arguments := call.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            value = json.loads(arguments)
            read["arguments"] = value if isinstance(value, dict) else arguments
    return read
