"""What the methods that learn from choices share: a chosen and a rejected answer, side by side in every batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..tensors import Batch


def pair_count(batch: Batch) -> int:
    """Pairs of a batch: Examples 2i and 2i + 1 are what was chosen and what was rejected."""
    return len(batch.ids) // 2


def per_answer(values: Float[Tensor, "S"], batch: Batch) -> Float[Tensor, "pairs 2"]:
    """Sums of `values` over each answer's scored tokens; the chosen answer stands first."""
    sums = torch.zeros(len(batch.ids), dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.owner, values).view(-1, 2)
