"""Pairs that are given: a file of prompts with two answers each, or gold pairs whose better answer is known.

The two answers stand in columns answer_a and answer_b (model_a and model_b may say who wrote them, `gold` which is
better), or in chosen and rejected, where chosen is the better one of a gold pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ..data.files import records
from ..data.read import read
from ..errors import DataError
from ..recipe import DataSpec
from ..types import Comparison
from .choices import Pair, Side

_FIX = "Write prompt, answer_a and answer_b, or prompt, chosen and rejected."


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a file holds: pairs, and how many rows had two equal answers, which nobody can choose between."""

    pairs: tuple[Pair, ...]
    equal: int


def given_pairs(source: str, *, gold: bool = False) -> Given:
    """Read a file of pairs (.jsonl .json .csv .parquet, also .gz). Raises DataError with file:line."""
    named = _names_sides(source)
    columns = {"chosen": "answer_a", "rejected": "answer_b"} if named else {}
    spec = DataSpec(train=source, layout="preference", columns=columns)
    rows = [row for row in read(source, spec) if isinstance(row, Comparison)]
    pairs = [_pair(row, gold=gold, named=named) for row in rows]
    different = tuple(pair for pair in pairs if pair.a != pair.b)
    if not different:
        raise DataError("both answers of every row are equal", where=source, fix="Give rows whose answers differ.")
    return Given(pairs=different, equal=len(pairs) - len(different))


def _names_sides(source: str) -> bool:
    """Whether the answers stand in answer_a and answer_b. Raises DataError for a file that has neither layout."""
    first: Iterator[tuple[str, Mapping[str, object]]] = records(source)
    where, fields = next(first, (source, {}))
    if not fields:
        raise DataError("the file has no rows", where=source, fix=_FIX)
    found = {"answer_a", "answer_b"} & set(fields)
    if len(found) == 1:
        raise DataError(f"there is {found.pop()!r} and no other answer", where=where, fix=_FIX)
    return bool(found)


def _pair(row: Comparison, *, gold: bool, named: bool) -> Pair:
    better: Side | Literal[""] = ""
    if gold:
        better = _better(row) if named else "a"
    models = [row.extra.get(name) for name in ("model_a", "model_b")]
    model_a, model_b = ("" if model is None else str(model) for model in models)
    return Pair(prompt=row.prompt, a=row.chosen, b=row.rejected, model_a=model_a, model_b=model_b, gold=better)


def _better(row: Comparison) -> Side:
    told = str(row.extra.get("gold", "")).strip().casefold()
    if told == "a" or told == "answer_a":
        return "a"
    if told == "b" or told == "answer_b":
        return "b"
    what = f"gold is {told!r}" if "gold" in row.extra else "there is no column 'gold'"
    raise DataError(f"{what}, so the better answer is not known", where=row.source, fix="Write gold: a, or gold: b.")
