"""Chance as a function of what a row says: the same on every machine, and other rows of the file have no part in it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from ..types import Row
from .store import View, some


def uniform(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=6).digest(), "big") / 2**48


def in_order(rows: Sequence[Row], seed: int) -> View[Row]:
    """Rows sorted by a hash of their content and `seed`; equal rows keep the order they came in."""
    return some(rows, _ranking(rows, "order", seed))


def drawn(rows: Sequence[Row], count: int, seed: int) -> View[Row]:
    """At most `count` of the rows, in the order they came in; a larger draw by the same seed holds the smaller one."""
    return some(rows, np.sort(_ranking(rows, "drawn", seed)[:count]))


def _ranking(rows: Sequence[Row], purpose: str, seed: int) -> np.ndarray:
    keys = np.fromiter((uniform(f"{purpose}:{row.id}", seed) for row in rows), np.float64, len(rows))
    return np.argsort(keys, kind="stable")
