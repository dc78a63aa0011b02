"""Supervised fine-tuning: make the examples' answers likely.

    loss = - sum_t w_t log p(y_t | x, y_<t) / sum_t w_t        over every trained token of the whole step

The denominator is counted over all micro-batches and ranks before the first backward pass, so neither packing nor
accumulation nor the number of processes changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..data.pack import pack
from ..errors import TrainingError
from ..tensors import Batch, LossTerms, Scores
from ..types import Example
from ..world import World


class CrossEntropy:
    """Weighted negative log-likelihood, in nats."""

    def count(self, batch: Batch) -> float:
        """Sum of the weights."""
        return float(batch.weights.sum())

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over scored tokens."""
        return LossTerms(sum=-(scores.log_probs * batch.weights).sum())


class SftSteps:
    """Batches of `batch` examples in an order that depends on (seed, epoch) alone.

    Raises TrainingError when a step has fewer examples than there are processes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        epochs: float,
        budget_tokens: int,
        world: World,
        seed: int = 0,
        max_steps: int | None = None,
        packs: bool = True,
    ) -> None:
        self.examples, self.batch, self.seed, self.world = examples, min(batch, len(examples)), seed, world
        if self.batch < world.size:
            raise TrainingError(
                f"{world.size} processes cannot share steps of {self.batch} examples",
                where="train.batch",
                fix=f"Set train.batch to {world.size} or more, or start fewer processes.",
            )
        self.budget_tokens = budget_tokens if packs else 1
        self.share = packs
        self.steps = max(1, math.ceil(epochs * len(examples) / self.batch))
        if max_steps is not None:
            self.steps = min(self.steps, max_steps)

    def __call__(self, step: int) -> list[Batch]:
        """This rank's packed batches of a step."""
        chosen = self.world.share(self.rows(step))
        return pack([self.examples[row] for row in chosen], budget_tokens=self.budget_tokens, share=self.share)

    def rows(self, step: int) -> list[int]:
        """Indices of the step's examples; an epoch's end may fall inside a step."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [int(self._order(place // len(self.examples))[place % len(self.examples)]) for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.examples))
