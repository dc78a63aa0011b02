"""Which rows are kept, and a ledger entry for every one that is not.

Dropped: empty rows, exact and near-duplicates, contradictions, held-out rows that leaked into train. Flagged, and
kept: what looks like a secret or personal data. Rows that are too long need a tokenizer to be known; `drop_overlong`
takes their lengths from the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import DataError
from ..recipe import DataSpec
from ..types import Action, Comparison, LedgerEntry, Message, Row
from .layout import content_id
from .privacy import personal_data, secrets
from .similar import near_pairs
from .split import Splits, prompt_key

SPLITS = ("train", "valid", "test")

EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
EXACT_DUPLICATE = "exact duplicate"
CONFLICT = "conflicting completion"
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


def curate(splits: Splits, spec: DataSpec) -> tuple[Splits, list[LedgerEntry]]:
    """Keep the usable rows of each split, in their order, and say of every other row why not.

    Within a split the row that stands first in its file is the one kept. A held-out row is kept before a training row,
    and a test row before a validation row. Raises DataError when nothing is left to train on or to measure with.
    """
    ledger: list[LedgerEntry] = []
    test = _distinct(splits.test, spec, ledger)
    valid = _distinct(splits.valid, spec, ledger)
    train = _distinct(splits.train, spec, ledger)
    valid = _unleaked(valid, test, ledger)
    train = _unleaked(train, [*test, *valid], ledger)
    train, valid = _unlike(train, valid, test, spec, ledger)
    kept = {"train": train, "valid": valid, "test": test}
    for name in SPLITS:
        before: tuple[Row, ...] = getattr(splits, name)
        if before and not kept[name]:
            sources = {row.source for row in before}
            lost = [entry for entry in ledger if entry.source in sources]
            reasons = Counter(entry.reason for entry in lost).most_common()
            what = f"no row of {name} is left of {len(before)}: {', '.join(f'{n} {reason}' for reason, n in reasons)}"
            fix = f"Look at {lost[0].source}: {' '.join([lost[0].reason, lost[0].detail]).strip()}."
            raise DataError(what, where=f"data.{name}", fix=fix)
    for rows in kept.values():
        ledger += _flags(rows)
    sources = {name: {row.source for row in rows} for name, rows in kept.items()}
    return (
        Splits(
            train=tuple(row for row in splits.train if row.source in sources["train"]),
            valid=tuple(row for row in splits.valid if row.source in sources["valid"]),
            test=tuple(row for row in splits.test if row.source in sources["test"]),
        ),
        ledger,
    )


def drop_overlong(
    rows: Sequence[Row], lengths_tokens: Sequence[int], limit_tokens: int, policy: Literal["error", "drop"]
) -> tuple[tuple[Row, ...], list[LedgerEntry]]:
    """Drop rows of more than `limit_tokens` tokens, or raise DataError that names the first of them.

    Raises DataError also when every row is too long.
    """
    pairs = list(zip(rows, lengths_tokens, strict=True))
    long = [(row, length) for row, length in pairs if length > limit_tokens]
    if long and (policy == "error" or len(long) == len(pairs)):
        row, length = long[0]
        more = f" ({len(long)} of {len(pairs)} rows are)" if len(long) > 1 else ""
        what = f"the row has {length} tokens, more than max_tokens = {limit_tokens}{more}"
        fix = "Shorten it, raise data.max_tokens if the model's context allows, or set data.overlong: drop."
        raise DataError(what, where=row.source, fix=fix)
    kept = tuple(row for row, length in pairs if length <= limit_tokens)
    return kept, [_entry(row, OVERLONG, f"{length} tokens, limit {limit_tokens}") for row, length in long]


def census(before: Splits, after: Splits, ledger: Iterable[LedgerEntry]) -> Census:
    """Count what became of the rows: `before` as split, `after` as kept, `ledger` in between."""
    entries = list(ledger)
    counts = {}
    for name in SPLITS:
        rows: tuple[Row, ...] = getattr(before, name)
        sources = {row.source for row in rows}
        mine = [entry for entry in entries if entry.source in sources]
        counts[name] = SplitCount(
            read=len(rows),
            kept=len(getattr(after, name)),
            dropped=dict(Counter(entry.reason for entry in mine if entry.action == "dropped")),
            flagged=dict(Counter(entry.reason for entry in mine if entry.action == "flagged")),
        )
    return Census(splits=counts)


def _distinct(rows: Iterable[Row], spec: DataSpec, ledger: list[LedgerEntry]) -> list[Row]:
    """Rows in file order without the empty, the repeated and, as the recipe says, the contradicting ones."""
    kept: list[Row] = []
    first_of: dict[str, Row] = {}
    answered: dict[str, Row] = {}
    for row in sorted(rows, key=_place):
        empty = _empty(row)
        same = first_of.setdefault(row.id, row)
        if empty:
            ledger.append(_entry(row, empty))
            continue
        if same is not row:
            ledger.append(_entry(row, EXACT_DUPLICATE, f"same as {same.source}"))
            continue
        rival = answered.setdefault(_question(row), row)
        if rival is not row:
            action: Action = "dropped" if spec.conflicts == "drop" else "flagged"
            ledger.append(_entry(row, CONFLICT, f"{rival.source} answers the same prompt differently", action))
            if action == "dropped":
                continue
        kept.append(row)
    return kept


def _unleaked(rows: Iterable[Row], held_out: Iterable[Row], ledger: list[LedgerEntry]) -> list[Row]:
    """Rows whose prompt is not asked in `held_out`."""
    asked = {prompt_key(row): row for row in held_out}
    kept = []
    for row in rows:
        twin = asked.get(prompt_key(row))
        if twin is None:
            kept.append(row)
        else:
            how = "same row as" if twin.id == row.id else "same prompt as"
            ledger.append(_entry(row, LEAKAGE, f"{how} held-out {twin.source}"))
    return kept


def _unlike(
    train: list[Row], valid: list[Row], test: list[Row], spec: DataSpec, ledger: list[LedgerEntry]
) -> tuple[list[Row], list[Row]]:
    """Train without near-duplicates of held-out or earlier rows, and valid without near-duplicates of test."""
    rows = [*test, *valid, *train]
    of_split = [2] * len(test) + [1] * len(valid) + [0] * len(train)
    dropped: set[int] = set()
    for earlier, later in sorted(near_pairs(rows, spec.near_duplicates), key=lambda pair: (pair[1], pair[0])):
        inside = of_split[earlier] == of_split[later]
        # Test and validation keep their near-duplicates: they are the questions that people ask.
        if later in dropped or (inside and (earlier in dropped or of_split[later] != 0)):
            continue
        dropped.add(later)
        where = rows[earlier].source
        reason, detail = (NEAR_DUPLICATE, f"nearly {where}") if inside else (LEAKAGE, f"nearly held-out {where}")
        ledger.append(_entry(rows[later], reason, detail))
    kept = [row for index, row in enumerate(rows) if index not in dropped and of_split[index] == 0]
    return kept, [row for index, row in enumerate(rows) if index not in dropped and of_split[index] == 1]


def _flags(rows: Iterable[Row]) -> list[LedgerEntry]:
    entries = []
    checks: tuple[tuple[str, Callable[[str], list[str]]], ...] = ((SECRET, secrets), (PERSONAL_DATA, personal_data))
    for row in rows:
        text = "\n".join(_texts(row))
        for reason, find in checks:
            # The ledger names the kind and never repeats the find.
            if kinds := find(text):
                entries.append(_entry(row, reason, ", ".join(kinds), "flagged"))
    return entries


def _empty(row: Row) -> str:
    if isinstance(row, Comparison):
        blank = not row.chosen.content.strip() or not row.rejected.content.strip()
        return EMPTY_PROMPT if not _asks(row.prompt) else EMPTY_COMPLETION if blank else ""
    if not row.messages:
        return "" if row.text.strip() else EMPTY_COMPLETION
    answer = row.messages[-1]
    if not _asks(row.prompt):
        return EMPTY_PROMPT
    return "" if answer.content.strip() or answer.tool_calls else EMPTY_COMPLETION


def _asks(prompt: Sequence[Message]) -> bool:
    return any(message.role != "system" and message.content.strip() for message in prompt)


def _question(row: Row) -> str:
    """Rows with an equal question contradict each other unless they are equal."""
    if isinstance(row, Comparison):
        # A person contradicts himself by judging the same pair the other way; people may differ.
        answers = sorted([row.chosen.content, row.rejected.content])
        return content_id(prompt_key(row), answers, row.rater)
    tools = [dict(tool) for tool in row.tools]
    return content_id(prompt_key(row), tools)


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
