"""Supervised fine-tuning: make the examples' answers likely.

    loss = - sum_t w_t log p(y_t | x, y_<t) / sum_t w_t        over every trained token of the whole step

The denominator is counted over all micro-batches and ranks before the first backward pass, so neither packing nor
accumulation nor the number of processes changes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..tensors import Batch, LossTerms, Need, Scores
from ..types import Example
from .order import Alone, EpochSteps


class CrossEntropy:
    """Weighted negative log-likelihood, in nats."""

    needs: frozenset[Need] = frozenset({"log_probs"})

    def count(self, batch: Batch) -> float:
        """Sum of the weights."""
        return float(batch.weights.sum())

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over scored tokens."""
        return LossTerms(sum=-(scores.log_probs * batch.weights).sum())


class SftSteps(EpochSteps):
    """Single examples in the order of EpochSteps."""

    def __init__(self, examples: Sequence[Example], **how: Any) -> None:
        super().__init__(Alone(examples), **how)
