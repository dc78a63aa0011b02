"""What a GPU's attention kernels are told about a tree of segments, with plain loops in their place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tunesmith.model import flash
from tunesmith.model.attention import causal_attention
from tunesmith.model.flash import Meeting, flash_attention, meetings
from tunesmith.tensors import Layout

LAYOUTS = {
    "one row": Layout(lengths=(6,), parents=(-1,)),
    "unequal rows": Layout(lengths=(3, 7, 1, 7), parents=(-1, -1, -1, -1)),
    "shared prompt": Layout(lengths=(6, 4, 4, 2), parents=(-1, 0, 0, 0)),
    "two prompts": Layout(lengths=(6, 4, 5, 4, 2), parents=(-1, 0, -1, 2, 0)),
    "a prompt within a prompt": Layout(lengths=(4, 3, 5, 2, 6, 2), parents=(-1, 0, 1, 1, 0, 4)),
}
HEADS, GROUPS, SIZE, SCALING = 4, 2, 8, 0.3


def groups(which: Meeting) -> list[tuple[slice, slice]]:
    """Places of the queries and of the keys that meet."""
    ends = (which.query_ends.tolist(), which.key_ends.tolist())
    queries, keys = ([slice(a, b) for a, b in pairwise(part)] for part in ends)
    return list(zip(queries, keys, strict=True))


def logits(query: Tensor, key: Tensor, causal: bool, scaling: float) -> Tensor:
    """[H Q K], of keys that two heads share."""
    found = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(HEADS // GROUPS, 1)) * scaling
    return found.masked_fill(torch.ones(found.shape[1:]).triu(1) > 0, float("-inf")) if causal else found


def meet(query: Tensor, key: Tensor, value: Tensor, which: Meeting, scaling: float) -> tuple[Tensor, Tensor]:
    out, mass = torch.zeros_like(query), torch.zeros(HEADS, len(query), dtype=query.dtype)
    for q, k in groups(which):
        found = logits(query[q], key[k], which.causal, scaling)
        out[q] = torch.einsum("hqk,khd->qhd", found.softmax(-1), value[k].repeat_interleave(HEADS // GROUPS, 1))
        mass[:, q] = found.logsumexp(-1)
    return out, mass


def part_back(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mass: Tensor, which: Meeting, scaling: float
) -> tuple[Tensor, ...]:
    """dV = P^T dO, dS = P (dO V^T - sum(dO O)) with P = exp(S - mass) of the whole (FlashAttention-2, algorithm 2)."""
    found = [torch.zeros_like(part) for part in (query, key, value)]
    for q, k in groups(which):
        wide_key, wide_value = (part[k].repeat_interleave(HEADS // GROUPS, 1) for part in (key, value))
        weights = (logits(query[q], key[k], which.causal, scaling) - mass[:, q, None]).exp()
        along = torch.einsum("qhd,qhd->hq", slope[q], out[q])[..., None]
        inner = weights * (torch.einsum("qhd,khd->hqk", slope[q], wide_value) - along) * scaling
        found[0][q] = torch.einsum("hqk,khd->qhd", inner, wide_key)
        for place, sums in ((1, torch.einsum("hqk,qhd->khd", inner, query[q])),
                            (2, torch.einsum("hqk,qhd->khd", weights, slope[q]))):  # fmt: skip
            found[place][k] = sums.unflatten(1, (GROUPS, -1)).sum(2)
    return tuple(found)


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels exist on a GPU only; tests/test_gpu.py runs them."""
    monkeypatch.setattr(flash, "_meet", meet)
    monkeypatch.setattr(flash, "_part_back", part_back)


def alone(query: Tensor, key: Tensor, value: Tensor, layout: Layout, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """Each segment after copies of what it continues."""
    places = [slice(start, start + size) for start, size in zip(layout.starts, layout.lengths, strict=True)]
    found = []
    for segment, place in enumerate(places):
        past = [places[older] for older in layout.ancestors(segment)]
        k, v = (torch.cat([part[:, p] for p in (*past, place)], 1) for part in (key, value))
        if before:
            k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        found.append(causal_attention(query[None, :, place], k[None], v[None], SCALING)[0])
    return torch.cat(found, 1)


def draw(layout: Layout) -> list[Tensor]:
    generator, tokens = torch.Generator().manual_seed(0), sum(layout.lengths)
    sizes = (HEADS, GROUPS, GROUPS)
    return [torch.randn(n, tokens, SIZE, dtype=torch.float64, generator=generator).requires_grad_() for n in sizes]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_query_meets_its_own_segment_and_all_that_it_continues(name: str) -> None:
    layout = LAYOUTS[name]
    inputs = draw(layout)
    found = flash_attention(*inputs, SCALING, meetings(layout, torch.device("cpu")))
    expected = alone(*inputs, layout, None)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(*(torch.autograd.grad(part, inputs, slope) for part in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(LAYOUTS))
@torch.no_grad()
def test_what_comes_before_the_stream_is_met_by_all(name: str) -> None:
    layout = LAYOUTS[name]
    inputs, generator = draw(layout), torch.Generator().manual_seed(2)
    before = tuple(torch.randn(GROUPS, 5, SIZE, dtype=torch.float64, generator=generator) for _ in range(2))
    found = flash_attention(*inputs, SCALING, meetings(layout, torch.device("cpu")), before)  # type: ignore[arg-type]
    torch.testing.assert_close(found, alone(*inputs, layout, before))  # type: ignore[arg-type]
