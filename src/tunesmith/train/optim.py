"""The optimizer and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """AdamW with warm-up, a schedule and clipping; every value resolved."""

    learning_rate: float
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    epsilon: float = 1e-8
    checkpoint_seconds: float = 60.0


def adamw(parameters: Iterable[nn.Parameter], how: Optimization) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), one fused kernel per step."""
    return torch.optim.AdamW(
        list(parameters), lr=how.learning_rate, weight_decay=how.weight_decay, eps=how.epsilon, fused=True
    )


def learning_rate(step: int, steps: int, how: Optimization) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: a linear rise, then the schedule down to 0."""
    rise = max(1, math.ceil(how.warmup * steps))
    if step < rise:
        return how.learning_rate * (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[how.schedule]
    return how.learning_rate * factor
