"""Supervised fine-tuning: make the examples' answers likely.

    loss = - sum_t w_t log p(y_t | x, y_<t) / sum_t w_t        over every trained token of the whole step

The denominator is counted over all micro-batches and ranks before the first backward pass, so neither packing nor
accumulation nor the number of processes changes the gradient. Texts of the base's own (rehearsal.py) come beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.counts import counts
from ..data.pack import pack
from ..tensors import Batch, LossTerms, Need, Scores
from ..types import Example
from .order import Alone, EpochSteps
from .rehearsal import REHEARSED, Rehearsal


class CrossEntropy:
    """Weighted negative log-likelihood, in nats. Of rehearsed texts only the gradient counts, not the value."""

    needs: frozenset[Need] = frozenset({"log_probs"})

    def count(self, batch: Batch) -> float:
        """Sum of the answers' weights."""
        return 0.0 if REHEARSED in batch.extra else float(batch.weights.sum())

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over scored tokens."""
        total = -(scores.log_probs * batch.weights).sum()
        return LossTerms(sum=total - total.detach() if REHEARSED in batch.extra else total)


class SftSteps(EpochSteps):
    """Single examples in the order of EpochSteps, and what is rehearsed beside them."""

    def __init__(self, examples: Sequence[Example], *, rehearsal: Rehearsal | None = None, **how: Any) -> None:
        super().__init__(Alone(examples), **how)
        self.examples, self.rehearsal = examples, rehearsal or Rehearsal()

    def __call__(self, step: int) -> list[Batch]:
        """This rank's packed batches of a step; rehearsed texts, which begin otherwise, are packed apart."""
        trained_tokens = sum(float(self.examples[row].weights[1:].sum()) for row in self.rows(step))
        texts = self.rehearsal.of_step(step, self.batch, trained_tokens, self.seed)
        beside = pack(self.world.share(texts), budget_tokens=self.budget_tokens, share=False)
        return [*super().__call__(step), *beside]

    def row_tokens(self) -> list[float]:
        """Tokens that each row costs, its share of what is rehearsed included."""
        beside = self.rehearsal.tokens_a_row
        return [tokens + beside for tokens in counts(self.examples).tokens.tolist()]
