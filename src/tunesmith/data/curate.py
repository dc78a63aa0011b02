"""Which rows are kept, and a ledger entry for every one that is not.

Dropped: empty rows or answers, comparisons of an answer with itself, exact and near-duplicates, contradictions, held-
out rows that leaked into train, held-out questions that a training conversation goes through. Of near-duplicates one
stays in each split, so that every row tested is another observation. Flagged, and kept: raters who disagree, what
looks like a secret or personal data. Rows that are too long need a tokenizer to be known; `drop_overlong` takes their
lengths.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from ..errors import DataError
from ..recipe import DataSpec
from ..types import Action, Comparison, LedgerEntry, Message, Row
from .layout import content_id, is_prompt_only
from .privacy import personal_data, secrets
from .similar import near_pairs
from .split import Splits, Unit, content_key, earlier_question_keys, prompt_key, question_key, shared_keys
from .store import Places, Stored, View, join, some, stored_ledger

R = TypeVar("R", bound=Row)

SPLITS = ("train", "valid", "test")

EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
EMPTY_EARLIER = "empty answer on the way"
EQUAL_SIDES = "both answers are the same"
EXACT_DUPLICATE = "exact duplicate"
CONFLICT = "conflicting completion"
DISAGREEMENT = "raters disagree"
LEAKAGE = "leakage"
NEAR_DUPLICATE = "near duplicate"
SECRET = "possible secret"  # noqa: S105
PERSONAL_DATA = "possible personal data"
OVERLONG = "too many tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCount:
    """What became of one split's rows; `dropped` and `flagged` count by reason."""

    read: int
    kept: int
    dropped: Mapping[str, int]
    flagged: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What became of all rows, split by split and in all."""

    splits: Mapping[str, SplitCount]

    @property
    def total(self) -> SplitCount:
        """The sums over the splits."""
        counts = list(self.splits.values())
        dropped, flagged = Counter[str](), Counter[str]()
        for count in counts:
            dropped.update(count.dropped)
            flagged.update(count.flagged)
        return SplitCount(
            read=sum(count.read for count in counts),
            kept=sum(count.kept for count in counts),
            dropped=dict(dropped),
            flagged=dict(flagged),
        )


def curate(splits: Splits, spec: DataSpec) -> tuple[Splits, Stored[LedgerEntry]]:
    """Keep the usable rows of each split, in their order, and say of every other row why not.

    Within a split the row that stands first in its file is the one kept. A held-out row is kept before a training row,
    and a test row before a validation row. Raises DataError when nothing is left to train on or to measure with.
    """
    ledger = stored_ledger()
    test = _distinct(splits.test, spec, ledger)
    valid = _distinct(splits.valid, spec, ledger)
    train = _distinct(splits.train, spec, ledger)
    test, valid = _unheard(test, train, ledger), _unheard(valid, train, ledger)
    valid = _unleaked(valid, test, splits.unit, ledger)
    train = _unleaked(train, join(test, valid), splits.unit, ledger)
    train, valid, test = _unlike(train, valid, test, spec, ledger)
    kept = {"train": train, "valid": valid, "test": test}
    for name in SPLITS:
        before: Sequence[Row] = getattr(splits, name)
        if before and not kept[name]:
            lost = _about(before, ledger)
            reasons = Counter(entry.reason for entry in lost).most_common()
            what = f"no row of {name} is left of {len(before)}: {', '.join(f'{n} {reason}' for reason, n in reasons)}"
            fix = f"Look at {lost[0].source}: {' '.join([lost[0].reason, lost[0].detail]).strip()}."
            raise DataError(what, where=f"data.{name}", fix=fix)
    for rows in kept.values():
        ledger.extend(_flags(rows))
    return replace(splits, **{name: rows.restored() for name, rows in kept.items()}), ledger


def drop_overlong(
    rows: Sequence[R], lengths_tokens: Sequence[int], limit_tokens: int, policy: Literal["error", "drop"]
) -> tuple[View[R], Stored[LedgerEntry]]:
    """Drop rows of more than `limit_tokens` tokens, or raise DataError that names the first of them.

    Raises DataError also when every row is too long.
    """
    long = [place for place, length in enumerate(lengths_tokens) if length > limit_tokens]
    if long and (policy == "error" or len(long) == len(rows)):
        row = rows[long[0]]
        more = f" ({len(long)} of {len(rows)} rows are)" if len(long) > 1 else ""
        what = f"the row has {lengths_tokens[long[0]]} tokens, more than max_tokens = {limit_tokens}{more}"
        fix = "Shorten it, raise data.max_tokens if the model's context allows, or set data.overlong: drop."
        raise DataError(what, where=row.source, fix=fix)
    kept = some(rows, (place for place, length in enumerate(lengths_tokens) if length <= limit_tokens))
    told = (_entry(rows[place], OVERLONG, f"{lengths_tokens[place]} tokens, limit {limit_tokens}") for place in long)
    return kept, stored_ledger(told)


def census(before: Splits, after: Splits, ledger: Sequence[LedgerEntry]) -> Census:
    """Count what became of the rows: `before` as split, `after` as kept, `ledger` in between."""
    counts = {}
    for name in SPLITS:
        rows: Sequence[Row] = getattr(before, name)
        mine = _about(rows, ledger)
        counts[name] = SplitCount(
            read=len(rows),
            kept=len(getattr(after, name)),
            dropped=dict(Counter(entry.reason for entry in mine if entry.action == "dropped")),
            flagged=dict(Counter(entry.reason for entry in mine if entry.action == "flagged")),
        )
    return Census(splits=counts)


def _about(rows: Sequence[Row], ledger: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
    """The entries that name one of the rows."""
    sources = Places()
    if ledger:
        for row in rows:
            sources[row.source] = 0
    return some(ledger, (place for place, entry in enumerate(ledger) if sources[entry.source] >= 0))


def _distinct(rows: Sequence[Row], spec: DataSpec, ledger: Stored[LedgerEntry]) -> View[Row]:
    """Rows in file order without the empty, the repeated and, as the recipe says, the contradicting ones."""
    kept, first_of, answered, judged = array("q"), Places(), Places(), Places()
    rows = some(rows, _file_order(rows))
    for place, row in enumerate(rows):
        unusable = _unusable(row)
        same = first_of.setdefault(row.id, place)
        if unusable:
            ledger.append(_entry(row, unusable))
            continue
        if same != place:
            ledger.append(_entry(row, EXACT_DUPLICATE, f"same as {rows[same].source}"))
            continue
        rival = _at(rows, answered.setdefault(_question(row), place), row, place)
        if _contradict(row, rival) and (isinstance(row, Comparison) or spec.conflicts != "keep"):
            other = "prefers the other answer" if isinstance(row, Comparison) else "answers the same prompt differently"
            action: Action = "dropped" if spec.conflicts == "drop" else "flagged"
            ledger.append(_entry(row, CONFLICT, f"{rival.source} {other}", action))
            if action == "dropped":
                continue
        elif isinstance(row, Comparison):
            other_rater = _at(rows, judged.setdefault(_pair(row), place), row, place)
            if _contradict(row, other_rater):
                ledger.append(_entry(row, DISAGREEMENT, f"{other_rater.source} prefers the other answer", "flagged"))
        kept.append(place)
    return rows.only(kept)


def _at(rows: Sequence[Row], wanted: int, row: Row, place: int) -> Row:
    """The row at `wanted`, which is `row` itself if that is its `place`."""
    return row if wanted == place else rows[wanted]


def _file_order(rows: Sequence[Row]) -> np.ndarray:
    """Places of the rows, sorted by file and line."""
    files: dict[str, int] = {}
    lines = np.empty(len(rows), np.int64)
    file_of = np.empty(len(rows), np.int32)
    for place, row in enumerate(rows):
        name, lines[place] = _place(row)
        file_of[place] = files.setdefault(name, len(files))
    rank = np.argsort(np.argsort(np.array(list(files), dtype=object)))
    return np.lexsort((lines, rank[file_of]))


def _contradict(a: Row, b: Row) -> bool:
    """Whether two different rows with one question, or one pair of answers, say opposite things."""
    if isinstance(a, Comparison) and isinstance(b, Comparison):
        return shared_keys(a, "answer")[0] != shared_keys(b, "answer")[0]
    return a is not b


def _unleaked(rows: View[Row], held_out: Sequence[Row], unit: Unit, ledger: Stored[LedgerEntry]) -> View[Row]:
    """Rows whose prompt (`unit` answer: any of whose answers) stands in no row of `held_out`."""
    known, kept = Places(), array("q")
    for place, row in enumerate(held_out):
        for key in shared_keys(row, unit):
            known[key] = place
    for place, row in enumerate(rows):
        at = next((known[key] for key in shared_keys(row, unit) if known[key] >= 0), -1)
        if at < 0:
            kept.append(place)
        else:
            twin = held_out[at]
            how = "same row as" if twin.id == row.id else f"same {unit} as"
            ledger.append(_entry(row, LEAKAGE, f"{how} held-out {twin.source}"))
    return rows.only(kept)


def _unheard(rows: View[Row], train: Sequence[Row], ledger: Stored[LedgerEntry]) -> View[Row]:
    """Held-out rows whose question is no earlier turn of a training conversation, where its answer is trained."""
    heard, kept = Places(), array("q")
    for place, row in enumerate(train):
        for key in earlier_question_keys(row):
            heard[key] = place
    if not len(heard):
        return rows
    for place, row in enumerate(rows):
        at = heard[question_key(row)]
        if at < 0:
            kept.append(place)
        else:
            ledger.append(_entry(row, LEAKAGE, f"an earlier turn of the training row {train[at].source} asks the same"))
    return rows.only(kept)


def _unlike(
    train: View[Row], valid: View[Row], test: View[Row], spec: DataSpec, ledger: Stored[LedgerEntry]
) -> tuple[View[Row], View[Row], View[Row]]:
    """Each split without near-duplicates of its own earlier rows, train also of held-out rows, valid also of test."""
    rows = join(test, valid, train)
    of_split = np.repeat([2, 1, 0], [len(test), len(valid), len(train)])
    dropped = np.zeros(len(rows), bool)
    pairs = np.fromiter(near_pairs(rows, spec.near_duplicates), np.dtype([("earlier", "q"), ("later", "q")]))
    pairs = pairs[np.lexsort((pairs["earlier"], pairs["later"]))]
    for earlier, later in zip(map(int, pairs["earlier"]), map(int, pairs["later"]), strict=True):
        inside = of_split[earlier] == of_split[later]
        if dropped[later] or (inside and dropped[earlier]):
            continue
        # Two people's equal judgements are two observations.
        if inside and _rater(rows[earlier]) != _rater(rows[later]):
            continue
        dropped[later] = True
        where = rows[earlier].source
        reason, detail = (NEAR_DUPLICATE, f"nearly {where}") if inside else (LEAKAGE, f"nearly held-out {where}")
        ledger.append(_entry(rows[later], reason, detail))
    kept = np.split(~dropped, [len(test), len(test) + len(valid)])
    test, valid, train = (part.only(np.flatnonzero(k)) for part, k in zip((test, valid, train), kept, strict=True))
    return train, valid, test


def _flags(rows: Iterable[Row]) -> Iterator[LedgerEntry]:
    checks: tuple[tuple[str, Callable[[str], list[str]]], ...] = ((SECRET, secrets), (PERSONAL_DATA, personal_data))
    for row in rows:
        text = "\n".join(_texts(row))
        for reason, find in checks:
            # The ledger names the kind and never repeats the find.
            if kinds := find(text):
                yield _entry(row, reason, ", ".join(kinds), "flagged")


def _unusable(row: Row) -> str:
    """The reason why nothing can be learnt from a row by itself; empty if something can."""
    if not isinstance(row, Comparison) and not row.messages:
        return "" if row.text.strip() else EMPTY_COMPLETION
    if not _asks(row.prompt):
        return EMPTY_PROMPT
    answers = (row.chosen, row.rejected) if isinstance(row, Comparison) else row.messages[-1:]
    said = [(answer.content.strip(), answer.tool_calls) for answer in answers]
    if not all(text or calls for text, calls in said):
        return "" if is_prompt_only(row) else EMPTY_COMPLETION
    if isinstance(row, Comparison):
        return EQUAL_SIDES if said[0] == said[1] else ""
    earlier = (turn for turn in row.prompt if turn.role == "assistant")  # they are trained too
    return "" if all(turn.content.strip() or turn.tool_calls for turn in earlier) else EMPTY_EARLIER


def _asks(prompt: Sequence[Message]) -> bool:
    return any(message.role != "system" and message.content.strip() for message in prompt)


def _question(row: Row) -> str:
    """Rows with an equal question contradict each other unless they are equal."""
    if isinstance(row, Comparison):
        # A person contradicts himself by judging the same pair the other way; people may differ.
        return content_id(_pair(row), row.rater)
    tools = [dict(tool) for tool in row.tools]
    return content_id(prompt_key(row), tools)


def _pair(row: Comparison) -> str:
    """The two answers and their prompt, whichever was chosen."""
    return content_id(prompt_key(row), content_key(row, "answer"))


def _rater(row: Row) -> str:
    return row.rater if isinstance(row, Comparison) else ""


def _texts(row: Row) -> list[str]:
    if isinstance(row, Comparison):
        return [message.content for message in (*row.prompt, row.chosen, row.rejected)]
    return [row.text, *(f"{message.content} {list(message.tool_calls) or ''}" for message in row.messages)]


def _place(row: Row) -> tuple[str, int]:
    """File and line: where a source ends in `:number`, rows sort by that number."""
    name, _, number = row.source.rpartition(":")
    return (name, int(number)) if number.isdecimal() else (row.source, 0)


def _entry(row: Row, reason: str, detail: str = "", action: Action = "dropped") -> LedgerEntry:
    return LedgerEntry(source=row.source, id=row.id, action=action, reason=reason, detail=detail)
