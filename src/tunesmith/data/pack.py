"""Examples become packed batches: no padding, and what several of them begin with is stored once.

A step's Examples are laid into streams of at most `budget_tokens`. The longest prefix common to a stream's Examples (a
system prompt, an instruction) becomes a segment of its own that the others continue, as long as it is untrained; so
does what the Examples of a group share beyond it (the prompt of a pair, or of several sampled answers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..tensors import Batch, Layout
from ..types import Example

SHARE_FROM_TOKENS = 8


def bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit-decreasing: indices of `sizes` in as few bins of `budget` as that rule gives.

    A size over the budget gets a bin of its own: an example is never split.
    """
    room: list[int] = []
    members: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = [place for place, left in enumerate(room) if left >= sizes[item]]
        if fits:
            place = min(fits, key=lambda p: (room[p], p))
        else:
            place = len(room)
            room.append(budget)
            members.append([])
        room[place] -= sizes[item]
        members[place].append(item)
    return [sorted(group) for group in members]


def pack(examples: Sequence[Example], *, budget_tokens: int, share: bool = True) -> list[Batch]:
    """Packed batches of at most `budget_tokens` each (an Example over it stands alone)."""
    return pack_groups([[example] for example in examples], budget_tokens=budget_tokens, share=share)


def pack_groups(groups: Sequence[Sequence[Example]], *, budget_tokens: int, share: bool = True) -> list[Batch]:
    """Packed batches in which the Examples of a group stay together, side by side and in their order."""
    sizes = [sum(len(e.tokens) for e in group) - (len(group) - 1) * _prefix(group, share) for group in groups]
    return [pack_together([groups[i] for i in members], share=share) for members in bins(sizes, budget_tokens)]


def pack_one(examples: Sequence[Example], *, share: bool = True) -> Batch:
    """All of `examples` in one stream."""
    return pack_together([[example] for example in examples], share=share)


def pack_together(groups: Sequence[Sequence[Example]], *, share: bool = True) -> Batch:
    """All groups in one stream. Segments in order: the prefix of all, then each group's own and its Examples' rests."""
    examples = [example for group in groups for example in group]
    segments: list[tuple[int, int, int, int]] = []  # Example, first and last token, parent
    root = _prefix(examples, share)
    if root:
        segments.append((0, 0, root, -1))
    leaves: list[int] = []
    for group in groups:
        prefix, parent = max(_prefix(group, share), root), 0 if root else -1
        if prefix > root:
            segments.append((len(leaves), root, prefix, parent))
            parent = len(segments) - 1
        for example in group:
            segments.append((len(leaves), prefix, len(example.tokens), parent))
            leaves.append(len(segments) - 1)
    layout = Layout(
        lengths=tuple(end - begin for _, begin, end, _ in segments), parents=tuple(parent for *_, parent in segments)
    )
    scored = [np.flatnonzero(example.weights[1:]) + 1 for example in examples]
    shifts = [layout.starts[leaf] - segments[leaf][1] - 1 for leaf in leaves]
    return Batch(
        tokens=_long([examples[place].tokens[begin:end] for place, begin, end, _ in segments]),
        positions=_long([np.arange(begin, end) for _, begin, end, _ in segments]),
        layout=layout,
        index=_long([places + shift for places, shift in zip(scored, shifts, strict=True)]),
        targets=_long([example.tokens[places] for example, places in zip(examples, scored, strict=True)]),
        weights=_float([example.weights[places] for example, places in zip(examples, scored, strict=True)]),
        owner=_long([np.full(len(places), place) for place, places in enumerate(scored)]),
        ids=tuple(example.id for example in examples),
        extra={
            name: _float([example.extra[name][places] for example, places in zip(examples, scored, strict=True)])
            for name in examples[0].extra
        },
    )


def _prefix(examples: Sequence[Example], share: bool) -> int:
    """Tokens to store once for all of `examples`."""
    return common_prefix(examples) if share and len(examples) > 1 else 0


def common_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all Examples begin with, short of the one before the first trained token; 0 if hardly any."""
    first = examples[0].tokens
    limit = min(
        int(np.flatnonzero(example.weights)[0]) - 1 if example.weights.any() else len(example.tokens) - 1
        for example in examples
    )
    shared = max(limit, 0)
    for example in examples[1:]:
        differs = np.flatnonzero(first[:shared] != example.tokens[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared if shared >= SHARE_FROM_TOKENS else 0


def _float(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _long(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
