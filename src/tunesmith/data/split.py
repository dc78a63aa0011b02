"""Train, validation and test rows, chosen by what a row says and never by where it stands.

A row's place depends on its prompt and `data.seed` alone, so adding rows moves none of the old ones, and two machines
agree. Rows with one prompt stay together, and near-duplicates follow the first of them in the file, so that the test
set asks nothing that was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..errors import DataError, RecipeError
from ..recipe import DataSpec
from ..types import Row
from .layout import content_id
from .read import read
from .similar import near_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Rows to train on, to choose with, and to judge by; each in an order that is a function of content and seed."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]


def split(rows: Iterable[Row], spec: DataSpec) -> Splits:
    """Split `rows` by the fractions of `spec`, or read the files that `spec.valid` and `spec.test` name.

    A fraction of 0 gives an empty split. Raises DataError when a fraction or a file yields no row, RecipeError when the
    fractions leave nothing to train on.
    """
    rows = list(rows)
    valid_fraction = 0.0 if isinstance(spec.valid, str) else spec.valid
    test_fraction = 0.0 if isinstance(spec.test, str) else spec.test
    if valid_fraction + test_fraction >= 1:
        what = f"valid = {valid_fraction} and test = {test_fraction} leave nothing to train on"
        raise RecipeError(what, where="data", fix="Let them add up to less than 1.")
    shares: list[list[Row]] = [[], [], []]
    if valid_fraction or test_fraction:
        leaders = clusters(rows, spec.near_duplicates)
        for row, leader in zip(rows, leaders, strict=True):
            draw = uniform(prompt_key(rows[leader]), spec.seed)
            # Test first: changing the size of the validation split leaves the test split as it is.
            shares[2 if draw < test_fraction else 1 if draw < test_fraction + valid_fraction else 0].append(row)
    else:
        shares[0] = rows
    train, valid, test = shares
    _check_size(valid, "valid", valid_fraction, len(rows))
    _check_size(test, "test", test_fraction, len(rows))
    _check_size(train, "train", 1.0, len(rows))
    if isinstance(spec.valid, str):
        valid = list(read(spec.valid, spec))
    if isinstance(spec.test, str):
        test = list(read(spec.test, spec))
    return Splits(train=in_order(train, spec.seed), valid=in_order(valid, spec.seed), test=in_order(test, spec.seed))


def clusters(rows: Sequence[Row], threshold: float) -> list[int]:
    """For each row the position of its cluster's first row; rows with one prompt or near-duplicates share a cluster."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(a: int, b: int) -> None:
        a, b = sorted((root(a), root(b)))
        parent[b] = a

    first_of: dict[str, int] = {}
    for index, row in enumerate(rows):
        join(first_of.setdefault(prompt_key(row), index), index)
    for earlier, later in near_pairs(rows, threshold):
        join(earlier, later)
    return [root(index) for index in range(len(rows))]


def prompt_key(row: Row) -> str:
    """A hash of what is asked, spaces at the ends apart; of a row without a prompt, its id."""
    asked = [[message.role, message.content.strip()] for message in row.prompt]
    return content_id("prompt", asked) if any(text for _, text in asked) else row.id


def uniform(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=6).digest(), "big") / 2**48


def in_order(rows: Iterable[Row], seed: int) -> tuple[Row, ...]:
    """Rows sorted by a hash of their content and `seed`; equal rows keep the order they came in."""
    return tuple(sorted(rows, key=lambda row: uniform(f"order:{row.id}", seed)))


def _check_size(rows: Sequence[Row], name: str, fraction: float, count: int) -> None:
    if rows or not fraction:
        return
    fix = "Give more rows, or a larger fraction, or a file of its own."
    if name == "train":
        fix = "Give more rows, or smaller fractions for valid and test."
    share = "" if name == "train" else f" = {fraction}"
    raise DataError(f"{name}{share} of {count} rows gives an empty {name} split", where=f"data.{name}", fix=fix)
