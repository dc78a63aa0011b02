"""Decoding whose bits do not depend on the company: a row gets the same sums alone and among any others.

Matrix kernels are chosen by shape, and each adds up in an order of its own. What a row's neighbours can change is the
number of rows, which the kernels for two rows and more bear (`steady_product` sees to one), and the length of the
longest row, up to which all attend. So attention here goes in blocks of a fixed length. Blocks after a row's end add
zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from .cache import BLOCK_TOKENS, Cache, one_each


class SteadyDecode:
    """New tokens, each in the slot `slots` of a row that holds `places` tokens before it, and no prefix. See Attend."""

    def __init__(self, cache: Cache, slots: Int[Tensor, "N"], places: Int[Tensor, "N"]) -> None:
        self.cache, self.where, self.alone, self.places = cache, (slots, places), one_each(slots), places
        self.blocks = [slice(at, at + BLOCK_TOKENS) for at in range(0, int(places.max()) + 1, BLOCK_TOKENS)]
        self.place = torch.arange(self.blocks[-1].stop, device=places.device)[None]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend. Query heads that share keys are one matrix product."""
        count, groups = len(self.places), key.shape[0]
        keys, values = self.cache.file(layer, *self.where, key, value, self.blocks[-1].stop, self.alone)
        q = query.transpose(0, 1).reshape(count, groups, -1, query.shape[-1]) * scaling
        logits = torch.cat([q @ keys[:, :, block].transpose(-1, -2) for block in self.blocks], -1)
        logits.masked_fill_(self._unseen(window)[:, None, None], float("-inf"))
        weights = torch.softmax(logits, -1)
        out = weights[..., self.blocks[0]] @ values[:, :, self.blocks[0]]
        for block in self.blocks[1:]:
            out += weights[..., block] @ values[:, :, block]
        return out.flatten(1, 2).transpose(0, 1)

    def _unseen(self, window: int | None) -> Tensor:
        """Places [B K] after a row's own, or before its window."""
        unseen = self.place > self.places[:, None]
        return unseen if window is None else unseen | (self.place <= (self.places - window)[:, None])
