"""How many tokens Examples have: counted once, and kept beside Examples that lie on the disk.

Data, plan and batches each ask for the lengths of all of them, and would read every Example back for a few numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..types import Example
from .store import Lazy


class Counts(NamedTuple):
    """Of each Example: its tokens, those of them with a weight above zero, and those that the head predicts."""

    tokens: Int[np.ndarray, "examples"]
    trained: Int[np.ndarray, "examples"]
    scored: Int[np.ndarray, "examples"]


class Counted(Lazy[Example]):
    """Examples with their counts."""

    def __init__(self, examples: Sequence[Example], counts: Counts) -> None:
        self._examples, self.counts = examples, counts

    def __len__(self) -> int:
        return len(self._examples)

    def _at(self, place: int) -> Example:
        return self._examples[place]


def counts(examples: Sequence[Example]) -> Counts:
    """The counts that come with `examples`; else they are read, one at a time."""
    if isinstance(examples, Counted):
        return examples.counts
    numbers = chain.from_iterable(map(_of_one, examples))
    return Counts(*np.fromiter(numbers, np.int64, 3 * len(examples)).reshape(-1, 3).T)


def _of_one(example: Example) -> tuple[int, int, int]:
    weights = example.weights
    return len(example.tokens), int(np.count_nonzero(weights > 0)), int(np.count_nonzero(weights[1:]))
