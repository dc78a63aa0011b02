"""The order in which rows meet the optimizer, and whole steps of groups that packing may not split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ..data.pack import pack_groups
from ..errors import TrainingError
from ..tensors import Batch
from ..types import Example
from ..world import World


class EpochSteps:
    """Batches of `batch` groups in an order that depends on (seed, epoch) alone.

    A group is what stays together: one Example, or the two answers of a pair. `finish` may reshape each packed batch.
    Raises TrainingError when a step has fewer groups than there are processes.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Example]],
        *,
        batch: int,
        epochs: float,
        budget_tokens: int,
        world: World,
        seed: int = 0,
        max_steps: int | None = None,
        packs: bool = True,
        finish: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.groups, self.batch, self.seed, self.world = groups, min(batch, len(groups)), seed, world
        if self.batch < world.size:
            raise TrainingError(
                f"{world.size} processes cannot share steps of {self.batch} examples",
                where="train.batch",
                fix=f"Set train.batch to {world.size} or more, or start fewer processes.",
            )
        self.budget_tokens = budget_tokens if packs else 1
        self.share, self.finish = packs, finish
        self.steps = max(1, math.ceil(epochs * len(groups) / self.batch))
        if max_steps is not None:
            self.steps = min(self.steps, max_steps)

    def __call__(self, step: int) -> list[Batch]:
        """This rank's packed batches of a step."""
        chosen = [self.groups[row] for row in self.world.share(self.rows(step))]
        batches = pack_groups(chosen, budget_tokens=self.budget_tokens, share=self.share)
        return [self.finish(batch) for batch in batches]

    @property
    def rows_a_step(self) -> float:
        """Groups of a step: all of them where `batch` asks for more."""
        return self.batch

    def row_tokens(self) -> Sequence[float]:
        """Tokens of each group."""
        return [float(sum(len(example.tokens) for example in group)) for group in self.groups]

    def rows(self, step: int) -> list[int]:
        """Indices of the step's groups; an epoch's end may fall inside a step."""
        places = range(step * self.batch, (step + 1) * self.batch)
        count = len(self.groups)
        order = {epoch: shuffled(self.seed, epoch, count) for epoch in {place // count for place in places}}
        return [int(order[place // count][place % count]) for place in places]


class Alone(Sequence[Sequence[Example]]):
    """Each Example as a group of its own, made when asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        return (self.examples[place],)


@lru_cache(maxsize=2)  # every step asks, and a million rows take 15 ms
def shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of `size` rows that depends on (seed, epoch) alone. Read-only."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)
    order.flags.writeable = False
    return order
