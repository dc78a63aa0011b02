"""Examples become packed batches: no padding, and what several of them begin with is stored once.

A step's Examples are laid into streams of at most `budget_tokens`. A stream is a prefix tree: untrained tokens that
several Examples begin with (a system prompt, an instruction, the prompt of a pair) are a segment that the others
continue, as deep as it saves enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..tensors import Batch, Layout
from ..types import Example

SHARE_FROM_TOKENS = 8  # saved by a segment; fewer do not pay for one more attention


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
    root = common_prefix([example for group in groups for example in group]) if share and len(groups) > 1 else 0
    own = [_stored_tokens(group, share) - root for group in groups]
    return [pack_together([groups[i] for i in members], share=share) for members in bins(own, budget_tokens - root)]


def cut_to_fit(group: Sequence[Example], *, budget_tokens: int, share: bool = True) -> list[list[Example]]:
    """The group in its order, in as few parts of at most `budget_tokens` (an Example over it stands alone)."""
    parts: list[list[Example]] = []
    for example in group:
        if parts and _stored_tokens([*parts[-1], example], share) <= budget_tokens:
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts


def pack_one(examples: Sequence[Example], *, share: bool = True) -> Batch:
    """All of `examples` in one stream."""
    return pack_together([[example] for example in examples], share=share)


def pack_together(groups: Sequence[Sequence[Example]], *, share: bool = True) -> Batch:
    """All groups in one stream: a tree of segments, each after what it continues."""
    examples = [example for group in groups for example in group]
    segments = _segments(examples, share)
    layout = Layout(
        lengths=tuple(part.end - part.begin for part in segments), parents=tuple(part.parent for part in segments)
    )
    shifts = [0] * len(examples)  # from a place in a row to the one before it in the stream
    for part, start in zip(segments, layout.starts, strict=True):
        if part.leaf:
            shifts[part.example] = start - part.begin - 1
    scored = [np.flatnonzero(example.weights[1:]) + 1 for example in examples]
    return Batch(
        tokens=_long([examples[part.example].tokens[part.begin : part.end] for part in segments]),
        positions=_long([np.arange(part.begin, part.end) for part in segments]),
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


class _Part(NamedTuple):
    """Tokens begin..end of an Example, after those of the part `parent`; a leaf is the Example's own end."""

    example: int
    begin: int
    end: int
    parent: int
    leaf: bool


def _segments(examples: Sequence[Example], share: bool) -> list[_Part]:
    """A prefix tree of the Examples' untrained beginnings, parents first, each part's continuations right after it."""
    parts: list[_Part] = []
    limits = [_untrained(example) if share else 0 for example in examples]

    def grow(members: Sequence[int], begin: int, seen: int, parent: int) -> None:
        """Lay the members out from `begin`; their first `seen` tokens are alike."""
        if len(members) == 1:
            parts.append(_Part(members[0], begin, len(examples[members[0]].tokens), parent, leaf=True))
            return
        seen = _alike(examples, members, seen, min(limits[member] for member in members))
        if (seen - begin) * (len(members) - 1) >= SHARE_FROM_TOKENS:
            parts.append(_Part(members[0], begin, seen, parent, leaf=False))
            begin, parent = seen, len(parts) - 1
        branches: dict[object, list[int]] = {}
        for member in members:
            ended = limits[member] == seen
            branches.setdefault(("ended", member) if ended else int(examples[member].tokens[seen]), []).append(member)
        for branch in branches.values():
            grow(branch, begin, seen, parent)

    grow(range(len(examples)), 0, 0, -1)
    return parts


def _untrained(example: Example) -> int:
    """Tokens that may be shared: all before the one that predicts the first trained token."""
    first = int(np.flatnonzero(example.weights)[0]) if example.weights.any() else len(example.tokens)
    return max(first - 1, 0)


def _alike(examples: Sequence[Example], members: Sequence[int], start: int, limit: int) -> int:
    """How many of the first `limit` tokens the members share; `start` are known to be."""
    first = examples[members[0]].tokens
    for member in members[1:]:
        differs = np.flatnonzero(first[start:limit] != examples[member].tokens[start:limit])
        limit = start + int(differs[0]) if len(differs) else limit
    return limit


def _stored_tokens(group: Sequence[Example], share: bool) -> int:
    """Tokens that a group takes by itself."""
    return sum(part.end - part.begin for part in _segments(group, share))


def common_prefix(examples: Sequence[Example]) -> int:
    """Untrained tokens that all Examples begin with; 0 if hardly any."""
    shared = _alike(examples, range(len(examples)), 0, min(_untrained(example) for example in examples))
    return shared if shared >= SHARE_FROM_TOKENS else 0


def _float(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _long(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
