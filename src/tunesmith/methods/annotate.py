"""What a model says of Examples before it is trained on them: log-probabilities of a reference, values of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..data.pack import pack_groups
from ..model.load import Model
from ..model.score import score
from ..tensors import Need
from ..types import Example

Group = tuple[Example, ...]


@torch.no_grad()
def annotate(
    model: Model,
    groups: Sequence[Sequence[Example]],
    names: Mapping[Need, str],
    *,
    budget_tokens: int,
    temperature: float = 1.0,
) -> list[Group]:
    """The groups with one more number per trained token: `extra[names[need]]` is that part of the model's Scores."""
    flat = [example for group in groups for example in group]
    numbers = iter(range(len(flat)))
    numbered = [[replace(example, id=str(next(numbers))) for example in group] for group in groups]
    extras = [dict(example.extra) for example in flat]
    for batch in pack_groups(numbered, budget_tokens=budget_tokens if model.packs else 1, share=model.packs):
        parts = score(model, batch.to(model.device), frozenset(names), temperature).parts
        owner = batch.owner.numpy()
        for need, name in names.items():
            values = parts[need].float().cpu().numpy()
            for place, number in enumerate(batch.ids):
                extras[int(number)][name] = _spread(values[owner == place], flat[int(number)])
    annotated = iter([replace(example, extra=extra) for example, extra in zip(flat, extras, strict=True)])
    return [tuple(next(annotated) for _ in group) for group in groups]


def _spread(values: np.ndarray, example: Example) -> np.ndarray:
    """Values of the trained tokens at their places among all T, zero elsewhere."""
    spread = np.zeros(len(example.tokens), dtype=np.float32)
    spread[np.flatnonzero(example.weights[1:]) + 1] = values
    return spread
