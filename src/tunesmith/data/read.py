"""Rows from wherever they are: a file, the hub, or a built-in demonstration task.

    for row in read("tickets.jsonl", spec): ...

Files are streamed. A row that cannot be used stops the reading with its file and line; rows that can be used but should
not be (empty, repeated, leaking) pass here and are dropped, with an entry in the ledger, by curate.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ..errors import DataError
from ..recipe import DataSpec
from ..types import Conversation, Item, Message, Row
from . import tasks
from .chance import drawn
from .files import records
from .layout import PROMPT_ONLY, content_id, find_columns, to_messages, to_row
from .store import stored_rows

BUILTIN = "builtin:"
_FIRST_ROWS = 100
_MOST_NAMED = 12
_QUESTION = ("prompt", "question", "query")


def read(source: str, spec: DataSpec) -> Iterator[Row]:
    """Rows of `source` (.jsonl .json .csv .parquet, also .gz; hub id; `builtin:NAME`), in its order.

    `spec.rows` limits `spec.train` only: of a file, which may be sorted, so many rows are drawn by `spec.seed`; of a
    hub set, of which no more is fetched, they are the first. Raises DataError with file:line, RecipeError for an
    unknown built-in task.
    """
    limit = spec.rows if source == spec.train else None
    if source.startswith(BUILTIN):
        yield from tasks.builtin(source.removeprefix(BUILTIN), limit, seed=0)
    elif limit and Path(source).is_file():
        yield from drawn(stored_rows(_rows(source, spec)), limit, spec.seed)
    else:
        yield from islice(_rows(source, spec), limit)


def items(rows: Sequence[Conversation]) -> list[Item]:
    """Held-out questions: the prompt is all before the last assistant turn, the reference is that turn."""
    return [
        Item(prompt=row.prompt, reference=reference(row), id=row.id, tools=row.tools, extra=row.extra) for row in rows
    ]


def reference(row: Conversation) -> str:
    """The last answer; of one that only calls tools its calls, as a JSON list."""
    calls = row.messages[-1].tool_calls if row.messages else ()
    if row.completion or not calls:
        return row.completion
    return json.dumps([dict(call) for call in calls], ensure_ascii=False)


def unread(rows: Sequence[Row]) -> str:
    """What to say of columns of the user's that no turn is made of; empty where the first rows have none."""
    first = [row for row in rows[:_FIRST_ROWS] if not row.source.startswith(BUILTIN)]
    names = sorted({name for row in first for name in row.extra} - {PROMPT_ONLY})
    if not names:
        return ""
    more = ", ..." if len(names) > _MOST_NAMED else ""
    shown = ", ".join(map(repr, names[:_MOST_NAMED]))
    return f"columns that the model is not shown: {shown}{more} (data.columns says which column is what)"


def read_choices(source: str) -> list[Item]:
    """Multiple-choice questions: columns prompt, choices (a list of texts), answer (0-based index, text or letter).

    Raises DataError with file:line.
    """
    found = [_choice(fields, where) for where, fields in records(source)]
    if not found:
        raise DataError("the file has no rows", where=source, fix="Give a file with prompt, choices and answer.")
    return found


def _rows(source: str, spec: DataSpec) -> Iterator[Row]:
    columns = None
    for where, fields in records(source):
        if columns is None:
            columns = find_columns(list(fields), spec, where)
        yield to_row(fields, columns, where)
    if columns is None:
        raise DataError("the file has no rows", where=source, fix="Give a file with at least one row.")


def _choice(fields: dict[str, object], where: str) -> Item:
    question = next((fields[name] for name in _QUESTION if name in fields), None)
    if question is None or "choices" not in fields or "answer" not in fields:
        columns = ", ".join(map(repr, fields))
        fix = "Write prompt, choices (a list of texts) and answer (0-based index or text)."
        raise DataError(f"not a multiple-choice row; its columns are {columns}", where=where, fix=fix)
    if isinstance(question, str):
        prompt: tuple[Message, ...] = (Message(role="user", content=question),)
    else:
        prompt = to_messages(question, "prompt", where)
    choices = _choices(fields["choices"], where)
    index = _index(fields["answer"], choices, where)
    extra = {name: value for name, value in fields.items() if name not in (*_QUESTION, "choices", "answer")}
    identity = content_id([[message.role, message.content] for message in prompt], choices, index)
    return Item(prompt=prompt, reference=choices[index], choices=tuple(choices), id=identity, extra=extra)


def _choices(value: object, where: str) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value):
        raise DataError("'choices' is not a list of two or more texts", where=where, fix='Write ["yes", "no"].')
    return value


def _index(answer: object, choices: list[str], where: str) -> int:
    """The place of the right choice, given as its text, its 0-based index or its letter, looked for in that order."""
    text = str(answer).strip()
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < len(choices):
        return int(text)
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    fix = f"Give 0 to {len(choices) - 1}, or the text of a choice."
    raise DataError(f"the answer {text[:40]!r} is none of the choices", where=where, fix=fix)
