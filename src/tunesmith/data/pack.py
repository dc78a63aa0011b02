"""Examples become packed batches: no padding, and a prefix that all of them share is stored once.

A step's Examples are laid into streams of at most `budget_tokens`. The longest prefix common to a stream's Examples (a
system prompt, an instruction) becomes a segment of its own that the others continue, as long as it is untrained.
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
    groups = bins([len(example.tokens) for example in examples], budget_tokens)
    return [pack_one([examples[i] for i in group], share=share) for group in groups]


def pack_one(examples: Sequence[Example], *, share: bool = True) -> Batch:
    """All of `examples` in one stream."""
    prefix = common_prefix(examples) if share and len(examples) > 1 else 0
    lengths, parents, tokens, positions = [], [], [], []
    index, targets, weights, owner = [], [], [], []
    at = 0
    if prefix:
        lengths, parents, at = [prefix], [-1], prefix
        tokens, positions = [examples[0].tokens[:prefix]], [np.arange(prefix)]
    for place, example in enumerate(examples):
        own = example.tokens[prefix:]
        lengths.append(len(own))
        parents.append(0 if prefix else -1)
        tokens.append(own)
        positions.append(np.arange(prefix, prefix + len(own)))
        scored = np.flatnonzero(example.weights[1:]) + 1
        index.append(scored - 1 - prefix + at)
        targets.append(example.tokens[scored])
        weights.append(example.weights[scored])
        owner.append(np.full(len(scored), place))
        at += len(own)
    names = examples[0].extra.keys()
    return Batch(
        tokens=_long(tokens),
        positions=_long(positions),
        layout=Layout(lengths=tuple(lengths), parents=tuple(parents)),
        index=_long(index),
        targets=_long(targets),
        weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        owner=_long(owner),
        ids=tuple(example.id for example in examples),
        extra={name: _extra(examples, name) for name in names},
    )


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


def _extra(examples: Sequence[Example], name: str) -> torch.Tensor:
    parts = [example.extra[name][np.flatnonzero(example.weights[1:]) + 1] for example in examples]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _long(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
