"""The nouns of training: what a model is fed, what it gives back, what a loss says of it.

A Batch is one stream of T tokens without padding. Its Layout divides the stream into segments; a segment may name a
parent whose tokens it continues, so that a prompt shared by many answers is computed once. Numbers that belong to
trained tokens live at the S scored positions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Segments of a packed stream, in order. `parents[i]` is the segment that i continues, or -1."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def alone(cls, *lengths: int) -> Layout:
        """Segments of which none continues another."""
        return cls(lengths=lengths, parents=(-1,) * len(lengths))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each segment begins in the stream."""
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @property
    def real_tokens(self) -> int:
        """Tokens of the rows themselves: a shared prefix counts for every row that continues it."""
        leaves = set(range(len(self.lengths))) - set(self.parents)
        return sum(self.lengths[s] for leaf in leaves for s in (leaf, *self.ancestors(leaf)))

    def ancestors(self, segment: int) -> tuple[int, ...]:
        """The chain of segments that `segment` continues, oldest first."""
        chain: list[int] = []
        parent = self.parents[segment]
        while parent >= 0:
            chain.append(parent)
            parent = self.parents[parent]
        return tuple(reversed(chain))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One forward pass. `index[s]` is the stream position whose next token, `targets[s]`, is scored.

    `states`, where they are known beforehand, are what the frozen lower blocks make of the tokens.
    """

    tokens: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    layout: Layout
    index: Int[Tensor, "S"]
    targets: Int[Tensor, "S"]
    weights: Float[Tensor, "S"]
    owner: Int[Tensor, "S"]
    ids: tuple[str, ...]
    extra: Mapping[str, Float[Tensor, "S"]] = field(default_factory=dict)
    states: Float[Tensor, "T D"] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            layout=self.layout,
            index=self.index.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            owner=self.owner.to(device),
            ids=self.ids,
            extra={name: values.to(device) for name, values in self.extra.items()},
            states=None if self.states is None else self.states.to(device),
        )


Need = Literal["log_probs", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the model says at the scored positions; only the parts that the loss needs are there."""

    parts: Mapping[Need, Float[Tensor, "S"]]

    @property
    def log_probs(self) -> Float[Tensor, "S"]:
        """Log-probability of each target, in nats."""
        return self.parts["log_probs"]

    @property
    def values(self) -> Float[Tensor, "S"]:
        """What the scalar head says: the reward of an answer, or the value of a state."""
        return self.parts["values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """A SUM over the batch (never a mean), and further sums to report."""

    sum: Float[Tensor, ""]
    report: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A training objective over scored tokens. `needs` names the parts of Scores that it reads."""

    @property
    def needs(self) -> frozenset[Need]:
        """What is to be computed."""
        ...

    def count(self, batch: Batch) -> float:
        """This batch's share of the denominator, known before the forward pass."""
        ...

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """The loss summed over the batch."""
        ...


@runtime_checkable
class StepSource(Protocol):
    """Where batches come from: a function of the step, so that a resumed run sees the same data.

    Rollouts are a function of the step and of the weights at that step, which a resumed run has again.
    """

    steps: int

    def __call__(self, step: int) -> Sequence[Batch]:
        """The batches of optimizer step `step` (0-based) for this rank."""
        ...

    @property
    def rows_a_step(self) -> float:
        """How many rows a step counts on all ranks together, on average."""
        ...

    def row_tokens(self) -> Sequence[float]:
        """Tokens of each of the rows that a step counts: examples, pairs, or answers drawn so far."""
        ...
