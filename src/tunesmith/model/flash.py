"""Attention over a tree of segments on a GPU: branches.py in a few kernels for the whole stream.

FlashAttention (Dao 2023, arXiv 2307.08691) takes segments of unequal lengths in one call. A first call lets each query
meet the keys of its own segment; for each generation of shared segments another lets all queries meet what they
continue there. The parts are added up by the logarithms of their masses, as branches.py explains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..tensors import Layout
from .branches import Prefix

WIDEST_HEAD = 256
LONG_TOKENS = 1024  # from which cuDNN is faster by more than its plans cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Queries that meet keys group by group, each at `places` of the stream; None are all, in order.

    `ends` are where groups end, a 0 before them; `longest` the longest group of queries and of keys. `alike` is the
    length of all segments of a stream in which none continues another, else 0.
    """

    queries: Int[Tensor, "Q"] | None
    keys: Int[Tensor, "K"] | None
    query_ends: Int[Tensor, "N"]
    key_ends: Int[Tensor, "N"]
    longest: tuple[int, int]
    causal: bool
    alike: int = 0


def meetings(layout: Layout, device: torch.device) -> tuple[Meeting, ...]:
    """Own keys first, then one meeting for each generation of segments that others continue."""
    places = [range(start, start + size) for start, size in zip(layout.starts, layout.lengths, strict=True)]
    found = [_meeting(None, None, places, places, True, device)]
    generations: dict[int, dict[int, list[range]]] = defaultdict(lambda: defaultdict(list))
    for segment, place in enumerate(places):
        for generation, older in enumerate(layout.ancestors(segment)):
            generations[generation][older].append(place)
    for shared in generations.values():
        keys = [places[older] for older in shared]
        queries = [_joined(parts) for parts in shared.values()]
        found.append(_meeting(_joined(queries), _joined(keys), queries, keys, False, device))
    if len(found) == 1 and len(set(layout.lengths)) == 1:
        found[0] = replace(found[0], alike=layout.lengths[0])
    return tuple(found)


def _joined(parts: Iterable[Sequence[int]]) -> list[int]:
    return [place for part in parts for place in part]


def _meeting(
    queries: Sequence[int] | None,
    keys: Sequence[int] | None,
    of_queries: Sequence[Sequence[int]],
    of_keys: Sequence[Sequence[int]],
    causal: bool,
    device: torch.device,
) -> Meeting:
    def ends(groups: Sequence[Sequence[int]]) -> Tensor:
        sizes = np.cumsum([0, *(len(group) for group in groups)], dtype=np.int32)
        return torch.from_numpy(sizes).to(device)

    def index(places: Sequence[int] | None) -> Tensor | None:
        return None if places is None else torch.tensor(places, device=device)

    return Meeting(
        queries=index(queries),
        keys=index(keys),
        query_ends=ends(of_queries),
        key_ends=ends(of_keys),
        longest=(max(map(len, of_queries)), max(map(len, of_keys))),
        causal=causal,
    )


def flashes(query: Float[Tensor, "H T D"]) -> bool:
    """Whether the kernels take such queries."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= WIDEST_HEAD


def flash_attention(
    query: Float[Tensor, "H T D"],
    key: Float[Tensor, "G T D"],
    value: Float[Tensor, "G T D"],
    scaling: float,
    tree: Sequence[Meeting],
    before: Prefix | None = None,
) -> Float[Tensor, "H T D"]:
    """Attention of each query over its segment up to itself and what that continues; on a GPU, in 16 bits.

    `before`, which every segment continues, gets no gradient.
    """
    if before is None and tree[0].alike >= LONG_TOKENS:
        return _alike(query, key, value, scaling, tree[0].alike)
    return _FlashAttention.apply(query, key, value, scaling, tree, before)  # type: ignore[return-value]


def _alike(query: Tensor, key: Tensor, value: Tensor, scaling: float, length: int) -> Tensor:
    """Segments of one length that continue nothing, by cuDNN: nearly twice as fast, but it plans each length anew."""
    q, k, v = (part.unflatten(1, (-1, length)).transpose(0, 1) for part in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(0, 1).flatten(1, 2)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        tree: Sequence[Meeting],
        before: Prefix | None,
    ) -> Tensor:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        out, mass = _meet(query, key, value, tree[0], scaling)
        for more in tree[1:]:
            found = _meet(query[more.queries], key[more.keys], value[more.keys], more, scaling)
            _add(out, mass, more.queries, *found)
        if before is not None:
            k, v = (part.transpose(0, 1) for part in before)
            everyone = _meeting(None, None, [range(len(query))], [range(len(k))], False, query.device)
            _add(out, mass, slice(None), *_meet(query, k, v, everyone, scaling))
        ctx.save_for_backward(query, key, value, out, mass)
        ctx.scaling, ctx.tree, ctx.before = scaling, tree, before
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, mass = ctx.saved_tensors
        assert ctx.before is None
        slope, tree = grads[0].transpose(0, 1), ctx.tree
        d_query, d_key, d_value = _part_back(slope, query, key, value, out, mass, tree[0], ctx.scaling)
        for more in tree[1:]:
            q, k = more.queries, more.keys
            parts = (slope[q], query[q], key[k], value[k], out[q], mass[:, q])
            found = _part_back(*parts, more, ctx.scaling)
            d_query.index_add_(0, q, found[0])
            d_key.index_add_(0, k, found[1])
            d_value.index_add_(0, k, found[2])
        return *(part.transpose(0, 1) for part in (d_query, d_key, d_value)), None, None, None


def _meet(query: Tensor, key: Tensor, value: Tensor, which: Meeting, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [T H D] and the logarithm of its mass [H T], in float32."""
    ends = (which.query_ends, which.key_ends, *which.longest)
    found = torch.ops.aten._flash_attention_forward(query, key, value, *ends, 0.0, which.causal, False, scale=scaling)
    return found[0], found[1]


def _part_back(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mass: Tensor, which: Meeting, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values through one meeting, given the whole's `out` and `mass`."""
    ends = (which.query_ends, which.key_ends, *which.longest)
    no_dropout = (torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device))
    return torch.ops.aten._flash_attention_backward(
        slope, query, key, value, out, mass.contiguous(), *ends, 0.0, which.causal, *no_dropout, scale=scaling
    )


def _add(out: Tensor, mass: Tensor, on: Tensor | slice | None, more: Tensor, its_mass: Tensor) -> None:
    """Add a meeting [Q H D] to what its queries, which stand `on` these places, have met before."""
    old = mass[:, on]
    total = torch.logaddexp(old, its_mass)
    kept, new = (torch.exp(part - total).T[..., None] for part in (old, its_mass))
    out[on] = (out[on] * kept + more * new).to(out.dtype)
    mass[:, on] = total
