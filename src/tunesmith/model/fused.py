"""Two small operations, one autograd function each: they keep less for the backward pass and touch memory less.

A module of the model is replaced only if the replacement gives the same output on a random input, so an architecture
with another normalisation or gate keeps its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import met_as

TOLERANCE, BFLOAT16_TOLERANCE = 1e-5, 3e-2
_GATED = {"gate_proj", "up_proj", "down_proj"}


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^-1/2 (Zhang and Sennrich 2019, arXiv 1910.07467); keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        scale = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        d_weight = (grads[0] * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inner = grads[0] * weight
        along = (inner * normal).mean(-1, keepdim=True, dtype=scale.dtype)
        return inner.sub_(normal.mul_(along)).mul_(scale), d_weight, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202); keeps its two inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


class RmsNorm(nn.Module):
    """Root-mean-square normalisation."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[return-value]


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The gated feed-forward layer."""
        return self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


@torch.no_grad()
def use_fused(module: nn.Module) -> None:
    """Replace normalisations and gated layers, in place, where that changes nothing beyond rounding."""
    for child in module.modules():
        fused = _fused_class(child)
        if fused is None:
            continue
        like = next(child.parameters())
        probe = torch.randn(2, 3, like.shape[-1], generator=torch.Generator().manual_seed(0))
        probe = probe.to(like.device, met_as(like))
        near = TOLERANCE if probe.dtype == torch.float32 else BFLOAT16_TOLERANCE
        own, before = child.__class__, child(probe)
        child.__class__ = fused
        if not torch.allclose(child(probe), before, rtol=near, atol=near):
            child.__class__ = own


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that could stand in for `module`, judged by what it holds."""
    held, name = set(dict(module.named_children())), type(module).__name__
    if name.endswith("RMSNorm") and "variance_epsilon" in vars(module) and not held:
        weight = module.get_parameter("weight")
        return RmsNorm if weight.ndim == 1 else None
    return GatedMlp if _GATED <= held <= {*_GATED, "act_fn"} else None
