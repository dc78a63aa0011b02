"""Attention over a packed stream, plugged into any transformers model through its AttentionInterface.

The model's layers see one row of T tokens. What may attend to what is decided here, per segment, by an `attend`
argument that travels through the model's keyword arguments; no mask is ever built for the whole stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import ModelError
from ..tensors import Layout
from .branches import Branches, branch_attention
from .flash import Meeting, flash_attention, flashes, meetings

NAME = "tunesmith_packed"


@runtime_checkable
class Attend(Protocol):
    """How the queries of one layer meet keys and values. Heads first: H query heads, G groups of keys."""

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "H T D"],
        key: Float[Tensor, "G T D"],
        value: Float[Tensor, "G T D"],
        scaling: float,
        window: int | None,
    ) -> Float[Tensor, "H T D"]:
        """Attention output for every token of the stream."""
        ...


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer. Raises ModelError for attention it does not know."""
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ModelError(f"packed attention does not know {unsupported!r}", fix="The plain path is used instead.")
    if attend is None or query.shape[0] != 1:
        raise ModelError("packed attention got a padded batch", fix="This is a bug; please report it.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(int(module.layer_idx), query[0], key[0], value[0], scale, sliding_window)  # type: ignore[arg-type]
    return out.transpose(0, 1).unsqueeze(0), None


def register() -> None:
    """Tell transformers about `packed_attention`. Safe to call again."""
    AttentionInterface.register(NAME, packed_attention)


class PackedAttention:
    """Causal attention inside each segment and to the segments it continues.

    `prefix(layer)`, if given, holds keys and values [G P D] of tokens before the stream that every segment continues.
    Shared keys are read where they stand, on a CPU by branches.py, on a GPU in 16 bits by flash.py; elsewhere, and for
    windows, each row gets copies.
    """

    def __init__(self, layout: Layout, prefix: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> None:
        self.prefix, self.lengths = prefix, list(layout.lengths)
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for segment, length in enumerate(layout.lengths):
            groups[length, layout.ancestors(segment)].append(segment)
        self.groups = [(members, chain) for (_, chain), members in groups.items()]
        self.layout, self.branches = layout, Branches.of(layout)
        self.meetings: tuple[Meeting, ...] = ()
        self.longest = max(sum(self.lengths[s] for s in (members[0], *chain)) for members, chain in self.groups)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend."""
        before = self.prefix(layer) if self.prefix else None
        longest = self.longest + (before[0].shape[1] if before else 0)
        if window is None or window >= longest:
            if query.device.type == "cpu":
                return branch_attention(query, key, value, scaling, self.branches, before)
            if flashes(query):
                self.meetings = self.meetings or meetings(self.layout, query.device)
                return flash_attention(query, key, value, scaling, self.meetings, before)
        return self._with_copies(query, key, value, scaling, window, before)

    def _with_copies(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        before: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Segments of equal length and the same past as one batch."""
        found: list[Tensor] = [query] * len(self.lengths)
        before_key, before_value = before or (None, None)
        # Split once and not sliced: the gradient of a slice is as long as the stream.
        queries, keys, values = (x.split(self.lengths, 1) for x in (query, key, value))
        for members, chain in self.groups:
            q = torch.stack([queries[segment] for segment in members])
            k = _with_context(keys, members, chain, before_key)
            v = _with_context(values, members, chain, before_value)
            for segment, part in zip(members, causal_attention(q, k, v, scaling, window).unbind(0), strict=True):
                found[segment] = part
        return torch.cat(found, dim=1)


def causal_attention(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K D"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "B H L D"]:
    """Softmax attention of L queries over K >= L keys, the last L of which are the queries' own positions."""
    length, total = query.shape[2], key.shape[2]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if total == length and (window is None or window >= length):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    allowed = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    if window is not None:
        allowed &= torch.ones_like(allowed).triu(total - length - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)


def _with_context(
    parts: Sequence[Tensor], members: Sequence[int], chain: Sequence[int], before: Tensor | None
) -> Tensor:
    """Segments of equal length [B G L D] after what they continue: tokens before the stream, then their ancestors."""
    own = torch.stack([parts[segment] for segment in members])
    ahead = ([] if before is None else [before]) + [parts[segment] for segment in chain]
    if not ahead:
        return own
    context = torch.cat(ahead, dim=1).unsqueeze(0).expand(own.shape[0], -1, -1, -1)
    return torch.cat([context, own], dim=2)
