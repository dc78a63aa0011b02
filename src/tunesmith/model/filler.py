"""Passes of few sizes: tokens that belong to no row fill a stream up to a rounder number of them.

oneDNN writes code for every number of rows that it multiplies, and keeps two thirds of a megabyte of it for each of a
model's shapes, much of it for ever: streams of a thousand different lengths would take gigabytes (docs/speed.md). On a
CPU a stream therefore has one of 16 lengths between two powers of two, for some two tokens more in a hundred. Rows do
not see the filler, and nobody looks at what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..tensors import Batch, Layout
from .attention import Attend

EXACT_ROWS = 64  # so many sizes alone are few


def filler(rows: int, device: torch.device) -> int:
    """How many more `rows` there should be, at most a sixteenth."""
    if rows <= EXACT_ROWS or device.type != "cpu":
        return 0
    return -rows % (1 << (rows.bit_length() - 5))


def filled(batch: Batch) -> Batch:
    """The same rows in a stream of a rounder length, which ends in a segment of filler."""
    more = filler(len(batch.tokens), batch.tokens.device)
    if not more:
        return batch
    layout = Layout(lengths=(*batch.layout.lengths, more), parents=(*batch.layout.parents, -1))
    tokens, positions = F.pad(batch.tokens, (0, more)), F.pad(batch.positions, (0, more))
    states = None if batch.states is None else F.pad(batch.states, (0, 0, 0, more))
    return replace(batch, tokens=tokens, positions=positions, layout=layout, states=states)


def with_filler(
    tokens: Int[np.ndarray, "T"], positions: Int[np.ndarray, "T"], attend: Attend, more: int
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"], Attend]:
    """What a pass is given, with `more` tokens of filler, which `attend` does not meet."""
    if not more:
        return tokens, positions, attend
    return np.pad(tokens, (0, more)), np.pad(positions, (0, more)), _Without(attend, len(tokens), more)


@dataclass(frozen=True, slots=True)
class _Without:
    """`attend` for a stream in which `more` tokens of filler follow the `rows`."""

    attend: Attend
    rows: int
    more: int

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend."""
        q, k, v = (part[:, : self.rows] for part in (query, key, value))
        return F.pad(self.attend(layer, q, k, v, scaling, window), (0, 0, 0, self.more))
