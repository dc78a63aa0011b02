"""Attention over a tree of segments in which every key is read where it stands: no copies for rows that share it.

A segment's queries meet its own keys causally, and all keys of each segment that it continues. Each meeting is a plain
attention; they are softmaxes over disjoint keys, so they add up by the logarithms of their masses:

    out = sum_i exp(m_i - m) out_i,    m = log sum_i exp(m_i)          Milakov and Gimelshein 2018, arXiv 1805.02867

and the gradient of each is that of plain attention given the whole's `out` and m (Liu et al. 2023, arXiv 2310.01889).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..tensors import Layout

Prefix = tuple[Float[Tensor, "G P D"], Float[Tensor, "G P D"]]


@dataclass(frozen=True, slots=True)
class Branches:
    """Where the meetings are in the stream.

    `rows`: segments of equal length, each with its own keys. `shared`: a segment, and the places that continue it.
    """

    rows: tuple[tuple[slice, ...], ...]
    shared: tuple[tuple[slice, tuple[slice, ...]], ...]

    @staticmethod
    def of(layout: Layout) -> Branches:
        """The meetings of a layout."""
        places = [slice(start, start + size) for start, size in zip(layout.starts, layout.lengths, strict=True)]
        rows: dict[int, list[slice]] = defaultdict(list)
        shared: dict[int, list[slice]] = defaultdict(list)
        for segment, place in enumerate(places):
            rows[layout.lengths[segment]].append(place)
            for older in layout.ancestors(segment):
                shared[older].append(place)
        return Branches(
            rows=tuple(tuple(alike) for alike in rows.values()),
            shared=tuple((places[older], _merged(on)) for older, on in shared.items()),
        )


def branch_attention(
    query: Float[Tensor, "H T D"],
    key: Float[Tensor, "G T D"],
    value: Float[Tensor, "G T D"],
    scaling: float,
    branches: Branches,
    before: Prefix | None = None,
) -> Float[Tensor, "H T D"]:
    """Attention of each query over its segment up to itself and what that continues; on a CPU.

    `before`, which every segment continues, gets no gradient.
    """
    return _BranchAttention.apply(query, key, value, scaling, branches, before)  # type: ignore[return-value]


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, branches: Branches, before: Prefix | None
    ) -> Tensor:
        heads, length = query.shape[:2]
        keys, values = _each_head(key, heads), _each_head(value, heads)
        out = query.new_empty(heads, length, value.shape[-1])
        mass = query.new_empty(heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
        for rows in branches.rows:
            q, k, v = (_stack(part, rows) for part in (query, keys, values))
            found = _meet(q, k, v, True, scaling)
            for row, part, its_mass in zip(rows, *found, strict=True):
                out[:, row], mass[:, row] = part, its_mass
        for place, on in branches.shared:
            found = _meet(_join(query, on), keys[None, :, place], values[None, :, place], False, scaling)
            _add(out, mass, on, *found)
        if before is not None:
            k, v = (_each_head(part, heads)[None] for part in before)
            _add(out, mass, (slice(0, length),), *_meet(query[None], k, v, False, scaling))
        ctx.save_for_backward(query, key, value, out, mass)
        ctx.scaling, ctx.branches, ctx.before = scaling, branches, before
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, mass = ctx.saved_tensors
        assert ctx.before is None
        slope, heads = grads[0], query.shape[0]
        keys, values = _each_head(key, heads), _each_head(value, heads)
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)
        for rows in ctx.branches.rows:
            s, q, k, v, o, m = (_stack(part, rows) for part in (slope, query, keys, values, out, mass))
            for row, *found in zip(rows, *_part_back(s, q, k, v, o, m, True, ctx.scaling), strict=True):
                d_query[:, row], d_key[:, row], d_value[:, row] = found
        for place, on in ctx.branches.shared:
            s, q, o, m = (_join(part, on) for part in (slope, query, out, mass))
            found = _part_back(s, q, keys[None, :, place], values[None, :, place], o, m, False, ctx.scaling)
            for part, more in zip(on, found[0][0].split([p.stop - p.start for p in on], 1), strict=True):
                d_query[:, part] += more
            d_key[:, place] += found[1][0]
            d_value[:, place] += found[2][0]
        return d_query, _each_group(d_key, key), _each_group(d_value, value), None, None, None


def _meet(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [B H L D] and the logarithm of its mass [B H L]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)


def _part_back(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mass: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values through one meeting, given the whole's `out` and `mass`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        slope, query, key, value, out, mass, 0.0, causal, scale=scaling
    )


def _add(out: Tensor, mass: Tensor, on: Sequence[slice], more: Tensor, its_mass: Tensor) -> None:
    """Add a meeting [1 H L D] to what its queries, which stand `on` these places, have met before."""
    sizes = [place.stop - place.start for place in on]
    for place, part, new in zip(on, more[0].split(sizes, 1), its_mass[0].split(sizes, 1), strict=True):
        old = mass[:, place].clone()
        total = torch.logaddexp(old, new, out=mass[:, place])
        out[:, place].mul_((old - total).exp_()[..., None]).addcmul_(part, (new - total).exp_()[..., None])


def _merged(places: Sequence[slice]) -> tuple[slice, ...]:
    """Neighbours as one place."""
    found: list[slice] = []
    for place in places:
        if found and found[-1].stop == place.start:
            place = slice(found.pop().start, place.stop)
        found.append(place)
    return tuple(found)


def _stack(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """[B H L ...] of equal rows, a view if it is one."""
    return x[None, :, rows[0]] if len(rows) == 1 else torch.stack([x[:, row] for row in rows])


def _join(x: Tensor, places: Sequence[slice]) -> Tensor:
    """[1 H L ...] of all places, a view if it is one."""
    return (x[:, places[0]] if len(places) == 1 else torch.cat([x[:, place] for place in places], 1))[None]


def _each_head(x: Float[Tensor, "G T D"], heads: int) -> Float[Tensor, "H T D"]:
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)


def _each_group(slope: Float[Tensor, "H T D"], x: Float[Tensor, "G T D"]) -> Float[Tensor, "G T D"]:
    """The gradient of what several heads read."""
    groups = x.shape[0]
    return slope if slope.shape[0] == groups else slope.unflatten(0, (groups, -1)).sum(1)
