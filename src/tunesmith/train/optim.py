"""The optimizer and its learning rate, a pure function of the step.

Weights in bfloat16 have 8 bits of mantissa, and most of a run's steps are smaller than the last of them. So the
optimizer keeps the 16 bits that follow, and moves the float32 number that both make up; the model multiplies the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..model.kernels import compiled_on_gpu
from ..model.linear import Precision

BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimization:
    """AdamW with warm-up, a schedule and clipping; every value resolved. `precision` is that of products."""

    learning_rate: float
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    epsilon: float = 1e-8
    checkpoint_seconds: float = 60.0
    precision: Precision = "float32"


def adamw(parameters: Iterable[nn.Parameter], how: Optimization) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), one fused kernel per step, or one a weight in bfloat16."""
    trained = list(parameters)
    dials = {"lr": how.learning_rate, "weight_decay": how.weight_decay, "eps": how.epsilon, "betas": BETAS}
    if any(parameter.dtype == torch.bfloat16 for parameter in trained):
        return SplitAdamW(trained, dials)
    return torch.optim.AdamW(trained, **dials, fused=True)


def state_bytes(parameter: Tensor) -> int:
    """What AdamW holds for a weight besides the weight and its gradient: two moments, and bits that bfloat16 lacks."""
    return parameter.numel() * (8 if parameter.dtype == torch.float32 else 10)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW in float32 on weights of which bfloat16 parameters are the upper half; others are moved whole."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            dials: dict[float, Tensor] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._begin(parameter)
                state["step"] += 1
                done = float(state["step"])
                if done not in dials:
                    dials[done] = _dials(group, done).to(parameter.device)
                self._move(parameter, state, dials[done])

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        wide = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        state = self.state[parameter]
        state |= {"step": torch.tensor(0.0), "exp_avg": wide, "exp_avg_sq": wide.clone()}
        if parameter.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(wide, dtype=torch.int16)
        return state

    @staticmethod
    def _move(parameter: Tensor, state: dict[str, Tensor], dials: Tensor) -> None:
        moments = (state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        assert parameter.grad is not None
        weight, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        if "low" in state:
            _split_adamw(weight, state["low"].view(-1), gradient, *moments, dials)
        else:
            weight.copy_(_adamw(weight, gradient, *moments, dials))


def _dials(group: dict[str, Any], done: float) -> Float[Tensor, "7"]:
    """Learning rate, weight decay, epsilon, both betas, and what is left of the moments' bias."""
    first, second = group["betas"]
    rest = (1 - first**done, 1 - second**done)
    return torch.tensor([group["lr"], group["weight_decay"], group["eps"], first, second, *rest])


@compiled_on_gpu
def _split_adamw(
    weight: Tensor, low: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, dials: Float[Tensor, "7"]
) -> None:
    """One step of the numbers whose upper bits, rounded, are `weight` and the rest, with a sign, `low`."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + low
    moved = _adamw(bits.view(torch.float32), gradient, mean, square, dials).view(torch.int32)
    upper = (moved + 0x8000) >> 16
    weight.copy_(upper.to(torch.int16).view(torch.bfloat16))
    low.copy_(moved - (upper << 16))


def _adamw(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, dials: Float[Tensor, "7"]) -> Tensor:
    """The weights after a step; moves the moments."""
    rate, decay, epsilon, first, second, of_mean, of_square = dials.unbind()
    gradient = gradient.to(mean.dtype)
    mean.mul_(first).add_(gradient * (1 - first))
    square.mul_(second).add_(gradient.square() * (1 - second))
    return weight * (1 - rate * decay) - rate / of_mean * mean / ((square / of_square).sqrt() + epsilon)


def learning_rate(step: int, steps: int, how: Optimization) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: a linear rise, then the schedule down to 0."""
    rise = max(1, math.ceil(how.warmup * steps))
    if step < rise:
        return how.learning_rate * (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[how.schedule]
    return how.learning_rate * factor
