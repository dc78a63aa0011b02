"""From one record, whatever its columns are called, to one Conversation or Comparison.

The layout is found once, from the first record's columns, or forced by `data.layout`; every later record has to fit it,
so that a file which changes shape half-way is an error, not a silent loss. Columns that no layout reads go to `extra`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any

from ..errors import DataError, RecipeError
from ..recipe import DataSpec
from ..types import Comparison, Conversation, Message, Role, Row

Fields = Mapping[str, object]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Our name, then the names that other data sets use for it, best first.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "input", "instruction"),
    "completion": ("completion", "answer", "response", "output", "target"),
    "messages": ("messages", "conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "asked": ("input",),
    "preferred_output": ("preferred_output",),
    "non_preferred_output": ("non_preferred_output",),
    "system": ("system",),
    "tools": ("tools",),
    "rater": ("rater",),
}

REQUIRED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "openai_preference": ("asked", "preferred_output", "non_preferred_output"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "system", "rater"),
    "openai_preference": (),
    "messages": ("system", "tools"),
    "instruction": ("input", "system"),
    "prompt_completion": ("system", "tools"),
    "text": (),
    "prompt": ("system", "tools"),
}
# A row that only asks carries this in `extra`, and an empty answer for the policy to write.
PROMPT_ONLY = "prompt_only"
LABELS = ("label", "category", "class", "intent")

ACCEPTED = (
    "Accepted columns: prompt + completion; question + answer; messages; instruction (+ input) + output; text; "
    "prompt + chosen + rejected; input + preferred_output + non_preferred_output; prompt alone. Or map yours in the "
    "recipe, e.g. data.columns: {prompt: ticket, completion: reply}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A layout and, for each of our names that it reads, the file's own column name.

    `alone` says that the layout was found because there are no other columns, so that no row may have one.
    """

    layout: str
    names: Mapping[str, str]
    alone: bool = False


def content_id(*parts: object) -> str:
    """16 hex characters that depend on the content alone: the same on every machine and in every file."""
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return blake2b(canonical.encode("utf-8"), digest_size=8).hexdigest()


def conversation_id(messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = (), text: str = "") -> str:
    """The `id` of a Conversation: a hash of roles, contents, tool calls, tools and text."""
    return content_id(_canonical(messages), list(tools), text)


def comparison_id(prompt: Sequence[Message], chosen: Message, rejected: Message, rater: str = "") -> str:
    """The `id` of a Comparison. The rater is part of it: two people's equal judgements are two observations."""
    return content_id(_canonical(prompt), _canonical([chosen]), _canonical([rejected]), rater)


def plain_row(prompt: str, completion: str, source: str, extra: Fields | None = None) -> Conversation:
    """One user turn and its answer as a Conversation."""
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    return Conversation(messages=messages, id=conversation_id(messages), source=source, extra=extra or {})


def as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates and JSON want it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    return {**turn, "tool_calls": [dict(call) for call in message.tool_calls]} if message.tool_calls else turn


def message_of(fields: Mapping[str, Any]) -> Message:
    """The message that `as_dict` took apart."""
    return Message(role=fields["role"], content=fields["content"], tool_calls=tuple(fields.get("tool_calls", ())))


def is_prompt_only(row: Row) -> bool:
    """Whether a row only asks: its answer is empty because a policy is to write it."""
    return isinstance(row, Conversation) and row.extra.get(PROMPT_ONLY) is True


def find_columns(columns: Sequence[str], spec: DataSpec, where: str) -> Columns:
    """Choose the layout and match its names to `columns`. Raises DataError that lists the columns found."""
    _check_mapping(columns, spec, where)
    order = [spec.layout]
    if spec.layout == "auto":
        # A forgotten answer column is an error, so prompts alone are told by their very name.
        prompts_alone = {name.casefold() for name in columns} <= {"prompt", *OPTIONAL["prompt"]}
        order = [layout for layout in REQUIRED if layout != "prompt" or prompts_alone]
    found = [matched for layout in order if (matched := _match(layout, columns, spec)) is not None]
    if not found:
        wanted = "" if spec.layout == "auto" else f" for layout {spec.layout} ({' + '.join(REQUIRED[spec.layout])})"
        raise DataError(f"cannot make rows from the columns {_listed(columns)}{wanted}", where=where, fix=ACCEPTED)
    labels = [name for name in columns if name.casefold() in LABELS]
    if spec.layout == "auto" and found[0].layout == "text" and labels:
        text = found[0].names["text"]
        what = f"the columns {_listed(columns)} can be read as plain text or as text and label"
        fix = f"Write data.columns: {{prompt: {text}, completion: {labels[0]}}}, or data.layout: text."
        raise DataError(what, where=where, fix=fix)
    return replace(found[0], alone=spec.layout == "auto" and found[0].layout == "prompt")


def to_row(fields: Fields, columns: Columns, where: str) -> Row:
    """Turn one record into a row. Raises DataError with `where` for a missing column or a wrong type."""
    for name in REQUIRED[columns.layout]:
        if columns.names[name] not in fields:
            fix = (
                f"The first row has the layout {columns.layout}, so that every row needs {columns.names[name]!r}; "
                f"this one has {_listed(list(fields))}. Rows of another layout belong into another file."
            )
            raise DataError(f"the row has no {columns.names[name]!r}", where=where, fix=fix)
    ours = {name: fields[theirs] for name, theirs in columns.names.items() if theirs in fields}
    used = set(columns.names.values())
    extra = {name: value for name, value in fields.items() if name not in used}
    if columns.alone and extra:
        fix = "Give every row an answer, or write data.layout: prompt."
        raise DataError(f"the first row has a prompt alone, this one {_listed(list(fields))}", where=where, fix=fix)
    if columns.layout == "openai_preference":
        ours = _of_openai(ours, where)
    if columns.layout.endswith("preference"):
        return _comparison(ours, extra, where)
    if columns.layout == "text":
        text = _text(ours["text"], columns.names["text"], where)
        return Conversation(messages=(), text=text, id=conversation_id((), text=text), source=where, extra=extra)
    messages = _turns(ours, columns, where)
    tools = _tools(ours.get("tools"), where)
    if columns.layout == "prompt":
        extra = {**extra, PROMPT_ONLY: True}
    return Conversation(messages=messages, tools=tools, id=conversation_id(messages, tools), source=where, extra=extra)


def to_messages(value: object, name: str, where: str) -> tuple[Message, ...]:
    """Turns from a list of {role, content} or {from, value} objects, or from such a list as JSON text."""
    value = _parsed(value, name, where)
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} is {_kind(value)}, not a list of messages", where=where, fix=_MESSAGE_FIX)
    messages = tuple(_message(turn, f"{name}[{index}]", where) for index, turn in enumerate(value))
    if any(message.role == "system" for message in messages[1:]):
        raise DataError(f"{name!r} has a system message after the first turn", where=where, fix="Move it to the start.")
    return messages


_FILL = "Fill it in, or leave the row out."
_MESSAGE_FIX = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def _check_mapping(columns: Sequence[str], spec: DataSpec, where: str) -> None:
    for ours, theirs in spec.columns.items():
        if ours not in SYNONYMS:
            near = get_close_matches(ours, SYNONYMS, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            fix = f"{guess}Known: {_listed(list(SYNONYMS))}."
            raise RecipeError(f"unknown name {ours!r}", where="data.columns", fix=fix)
        if theirs not in columns:
            fix = f"The columns are {_listed(columns)}; change data.columns.{ours}."
            raise DataError(f"there is no column {theirs!r}", where=where, fix=fix)


def _match(layout: str, columns: Sequence[str], spec: DataSpec) -> Columns | None:
    """The columns of `layout`, or None when a required one is absent. A column serves one name only."""
    by_fold = {name.casefold(): name for name in reversed(columns)}
    wanted = REQUIRED[layout] + OPTIONAL[layout]
    names = {ours: theirs for ours, theirs in spec.columns.items() if ours in wanted}
    for ours in wanted:
        free = [by_fold[name] for name in SYNONYMS[ours] if name in by_fold and by_fold[name] not in names.values()]
        if ours not in names and free:
            names[ours] = free[0]
    if not all(name in names for name in REQUIRED[layout]):
        return None
    # An optional column may be absent from the first row and present in a later one.
    later = {name: name for name in OPTIONAL[layout] if name not in names and name not in names.values()}
    return Columns(layout=layout, names=names | later)


def _turns(ours: Fields, columns: Columns, where: str) -> tuple[Message, ...]:
    if columns.layout == "messages":
        messages = _with_system(to_messages(ours["messages"], columns.names["messages"], where), ours, where)
        if messages[-1].role != "assistant":
            fix = "End the row with the answer to imitate, or remove the row."
            raise DataError(f"the last message is from {messages[-1].role!r}, not the assistant", where=where, fix=fix)
        return messages
    if columns.layout == "instruction":
        instruction = _text(ours["instruction"], columns.names["instruction"], where)
        context = ours.get("input")
        given = "" if context is None else _text(context, columns.names["input"], where)
        content = f"{instruction}\n\n{given}" if given.strip() else instruction
        prompt = _with_system((Message(role="user", content=content),), ours, where)
        return (*prompt, _answer(ours["output"], columns.names["output"], where))
    prompt = _with_system(_prompt(ours["prompt"], columns.names["prompt"], where), ours, where)
    if columns.layout == "prompt":
        return (*prompt, Message(role="assistant", content=""))
    return (*prompt, _answer(ours["completion"], columns.names["completion"], where))


def _of_openai(ours: Fields, where: str) -> Fields:
    """OpenAI's preference row in our names. Raises DataError for tools, which comparisons do not hold."""
    asked = ours["asked"]
    if not isinstance(asked, dict) or "messages" not in asked:
        fix = 'Write "input": {"messages": [...]}.'
        raise DataError(f"'input' is {_kind(asked)} without messages", where=where, fix=fix)
    if asked.get("tools"):
        raise DataError("'input' has tools, which choices are not trained with", where=where, fix="Remove the row.")
    return {"prompt": asked["messages"], "chosen": ours["preferred_output"], "rejected": ours["non_preferred_output"]}


def _comparison(ours: Fields, extra: Fields, where: str) -> Comparison:
    chosen, rejected = _parsed_list(ours["chosen"]), _parsed_list(ours["rejected"])
    if ours.get("prompt") is not None:
        prompt = _with_system(_prompt(ours["prompt"], "prompt", where), ours, where)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        # Whole conversations without a prompt column: what they share before the last turn is the prompt.
        prompt, other = to_messages(chosen, "chosen", where)[:-1], to_messages(rejected, "rejected", where)[:-1]
        if prompt != other:
            raise DataError("chosen and rejected differ before the last turn", where=where, fix="Add a prompt column.")
        prompt, chosen, rejected = _with_system(prompt, ours, where), chosen[-1:], rejected[-1:]
    else:
        raise DataError("a preference needs a prompt", where=where, fix="Add a prompt column.")
    better, worse = _answer(chosen, "chosen", where, prompt), _answer(rejected, "rejected", where, prompt)
    given = ours.get("rater")
    rater = "" if given is None else str(given)
    return Comparison(
        prompt=prompt,
        chosen=better,
        rejected=worse,
        rater=rater,
        id=comparison_id(prompt, better, worse, rater),
        source=where,
        extra=extra,
    )


def _prompt(value: object, name: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, list):
        fix = "Write the prompt as text, or as a list of messages."
        raise DataError(f"{name!r} is {_kind(value)}, not text", where=where, fix=_FILL if value is None else fix)
    messages = to_messages(value, name, where)
    if messages[-1].role == "assistant":
        raise DataError(f"{name!r} ends with the assistant", where=where, fix="Move that turn to the answer's column.")
    return messages


def _answer(value: object, name: str, where: str, prompt: tuple[Message, ...] = ()) -> Message:
    """One assistant message from text, or from a list that is one assistant message (after the prompt, perhaps)."""
    if isinstance(value, str):
        return Message(role="assistant", content=value)
    if not isinstance(value, list):
        fix = "Write the answer as text (in quotes), or as a list of one assistant message."
        raise DataError(f"{name!r} is {_kind(value)}, not text", where=where, fix=_FILL if value is None else fix)
    messages = to_messages(value, name, where)
    if prompt and messages[:-1] == prompt:
        messages = messages[-1:]
    if len(messages) != 1 or messages[0].role != "assistant":
        raise DataError(f"{name!r} is not one assistant message", where=where, fix=_MESSAGE_FIX)
    return messages[0]


def _with_system(messages: tuple[Message, ...], ours: Fields, where: str) -> tuple[Message, ...]:
    system = ours.get("system")
    if system is None or system == "":
        return messages
    if messages and messages[0].role == "system":
        raise DataError("the row has a system column and a system message", where=where, fix="Keep one of them.")
    return (Message(role="system", content=_text(system, "system", where)), *messages)


def role_of(turn: Mapping[str, object]) -> Role | None:
    """Who speaks; None where nobody known does."""
    given = turn.get("role", turn.get("from"))
    return ROLES.get(given.casefold()) if isinstance(given, str) else None


def _message(turn: object, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{name} is {_kind(turn)}, not an object", where=where, fix=_MESSAGE_FIX)
    if (role := role_of(turn)) is None:
        given = turn.get("role", turn.get("from"))
        fix = f"Use one of {_listed(list(ROLES))}."
        raise DataError(f"{name} has the role {given!r}, which is unknown", where=where, fix=fix)
    if role == "assistant" and turn.get("weight", 1) in (0, False):
        fix = "Every assistant turn is trained; drop the key, or cut the row after the turn that should be learnt."
        raise DataError(f"{name} has weight 0, which is not supported", where=where, fix=fix)
    calls = _objects(turn.get("tool_calls"), f"{name}.tool_calls", where)
    content = turn.get("content", turn.get("value"))
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content", where) for part in content)
    return Message(role=role, content=_text(content, f"{name}.content", where), tool_calls=calls)


def _part(part: object, name: str, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return _text(part.get("text"), name, where)
    raise DataError(f"{name} has a part that is not text", where=where, fix="Only text is trained; remove the part.")


def _tools(value: object, where: str) -> tuple[Mapping[str, object], ...]:
    return _objects(_parsed(value, "tools", where), "tools", where)


def _objects(value: object, name: str, where: str) -> tuple[Mapping[str, object], ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple(value)
    raise DataError(f"{name} is {_kind(value)}, not a list of objects", where=where, fix="Write [{...}, {...}].")


def _parsed(value: object, name: str, where: str) -> object:
    """CSV cells, and many hub sets, hold lists as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{name!r} is text that is not JSON", where=where, fix="Write a JSON list.") from None


def _parsed_list(value: object) -> object:
    """A list of messages given as JSON text becomes that list; any other text stays text."""
    if not isinstance(value, str) or not value.lstrip().startswith('[{"'):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        fix = _FILL if value is None else "Put it in quotes, or leave the row out."
        raise DataError(f"{name!r} is {_kind(value)}, not text", where=where, fix=fix)
    return value


def _canonical(messages: Sequence[Message]) -> list[list[object]]:
    return [[message.role, message.content, list(message.tool_calls)] for message in messages]


def _kind(value: object) -> str:
    names = {type(None): "empty (null)", bool: "true/false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:20])
    return shown + (", ..." if len(names) > 20 else "") if names else "(none)"
