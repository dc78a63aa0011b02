"""Keys and values of rows in the making, and attention over them: for prompts, and for the tokens that are drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..tensors import Layout
from .attention import PackedAttention

BLOCK_TOKENS = 128  # a cache that grows holds a whole number of these


class Cache:
    """Keys and values: a prefix [G P D] common to all rows, and `rows` slots [rows G C D], the active ones first."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Storage of one layer, made on first use in the shape of `like` [G T D]."""
        if layer not in self.slots:
            shape = (self.rows, like.shape[0], self.capacity, like.shape[-1])
            self.slots[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.slots[layer]

    def file(
        self, layer: int, slots: Tensor, places: Tensor, key: Tensor, value: Tensor, tokens: int, one_each: bool
    ) -> tuple[Tensor, Tensor]:
        """File keys and values [G N D] of new tokens; give the first `tokens` that each one's row now holds, [N G K D].

        `one_each` says that slots are 0, 1, 2...
        """
        keys, values = self.layer(layer, key)
        keys[slots, :, places] = key.transpose(0, 1)
        values[slots, :, places] = value.transpose(0, 1)
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
        if one_each:
            return keys[: len(slots)], values[: len(slots)]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def reserve(self, tokens: int) -> None:
        """Make every slot hold at least `tokens`; doubles, so that it is rarely done."""
        if tokens <= self.capacity:
            return
        self.capacity = -(-max(tokens, 2 * self.capacity) // BLOCK_TOKENS) * BLOCK_TOKENS
        for layer, (keys, values) in list(self.slots.items()):
            del self.slots[layer]
            for new, old in zip(self.layer(layer, keys[0]), (keys, values), strict=True):
                new[:, :, : old.shape[2]] = old

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        for keys, values in self.slots.values():
            keys[target], values[target] = keys[source], values[source]


def one_each(slots: Int[Tensor, "N"]) -> bool:
    """Whether each token has a row of its own, of slots in order that leave none out."""
    return int(slots[-1]) + 1 == len(slots)


class Prefill(PackedAttention):
    """Packed attention that also files each segment's keys and values: in slots `first`..., or as the prefix."""

    def __init__(self, cache: Cache, layout: Layout, first: int | None) -> None:
        super().__init__(layout, cache.prefix.__getitem__ if cache.prefix else None)
        self.cache, self.first = cache, first
        sizes = torch.tensor(layout.lengths)
        self.slots = torch.arange(first or 0, (first or 0) + len(sizes)).repeat_interleave(sizes)
        self.places = torch.cat([torch.arange(length) for length in layout.lengths])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend."""
        out = super().__call__(layer, query, key, value, scaling, window)
        if self.first is None:
            self.cache.prefix[layer] = (key.contiguous(), value.contiguous())
            return out
        keys, values = self.cache.layer(layer, key)
        if key.is_cuda:
            keys[self.slots, :, self.places] = key.transpose(0, 1)
            values[self.slots, :, self.places] = value.transpose(0, 1)
            return out
        for n, (start, length) in enumerate(zip(self.layout.starts, self.layout.lengths, strict=True)):
            keys[self.first + n, :, :length] = key[:, start : start + length]
            values[self.first + n, :, :length] = value[:, start : start + length]
        return out


class Decode:
    """New tokens, each in the slot `slots` of a row that holds `places` tokens before it. See Cache.file.

    Where slots are 0, 1, 2... and `past` says how far back to look, a GPU is asked nothing.
    """

    def __init__(
        self, cache: Cache, slots: Int[Tensor, "N"], places: Int[Tensor, "N"], past: int | None = None
    ) -> None:
        self.cache, self.slots, self.places = cache, slots, places
        self.longest, self.alone = (past, True) if past else (int(places.max()) + 1, one_each(slots))
        self.unused = torch.arange(self.longest, device=places.device)[None] > places[:, None]
        self.bias = torch.zeros(self.unused.shape, device=places.device).masked_fill_(self.unused, float("-inf"))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend. Query heads that share keys are one matrix product."""
        rows, groups = len(self.slots), key.shape[0]
        keys, values = self.cache.file(layer, self.slots, self.places, key, value, self.longest, self.alone)
        q = query.transpose(0, 1).reshape(rows, groups, -1, query.shape[-1])
        before_keys, before_values = self.cache.prefix.get(layer, (None, None))
        if before_keys is None or before_values is None:
            bias = self._windowed(self.bias[:, None, None], 0, window).to(q.dtype)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scaling)
            return out.flatten(1, 2).transpose(0, 1)
        q = q * scaling
        logits = (q @ keys.transpose(-1, -2)).masked_fill_(self.unused[:, None, None], float("-inf"))
        length = before_keys.shape[1]
        flat = q.transpose(0, 1).flatten(1, 2)
        before = (flat @ before_keys.transpose(-1, -2)).unflatten(1, (rows, -1)).transpose(0, 1)
        weights = torch.softmax(self._windowed(torch.cat([before, logits], -1), length, window), -1)
        over_prefix = weights[..., :length].transpose(0, 1).flatten(1, 2) @ before_values
        out = over_prefix.unflatten(1, (rows, -1)).transpose(0, 1) + weights[..., length:] @ values
        return out.flatten(1, 2).transpose(0, 1)

    def _windowed(self, logits: Tensor, prefix: int, window: int | None) -> Tensor:
        if window is None or prefix + self.longest <= window:
            return logits
        place = torch.arange(logits.shape[-1], device=logits.device)
        far = place[None] <= (prefix + self.places - window)[:, None]
        return logits.masked_fill(far[:, None, None], float("-inf"))
