"""Linear layers whose matrix products run at the machine's rate.

PyTorch sends float32 products on a CPU to MKL, which on AMD processors stays at AVX2. oneDNN, in the same build, uses
AVX-512 where the processor has it; without it, it is the slower of the two, but for very wide outputs. A few rows go
faster as columns. Every way is true float32; docs/speed.md has the rates on both kinds of machine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
FEW_ROWS, MANY_COLUMNS = 64, 16_384


def product(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """x @ weight.T without autograd. `weight` may be a transposed view."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.shape[0]:
        return x @ weight.T
    if ONEDNN and (WIDE_VECTORS or weight.shape[0] >= MANY_COLUMNS):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return (weight @ x.T).T.contiguous() if 1 < x.shape[0] <= FEW_ROWS else x @ weight.T


def steady_product(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """`product` in which, in float32 on a CPU, a row's result does not depend on how many others there are.

    oneDNN adds up in the same order for two rows and more, and a single one is given a twin.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.shape[0] or not ONEDNN:
        return product(x, weight)
    if x.shape[0] == 1:
        return steady_product(x.expand(2, -1).contiguous(), weight)[:1]
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with dX = dY W and dW = dY^T X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if weight.requires_grad else None, weight)
        ctx.has_bias = bias is not None
        y = product(flat, weight)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = grads[0].reshape(-1, weight.shape[0])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = product(gradient, weight.T).view(*grads[0].shape[:-1], weight.shape[1]) if need_x else None
        dw = product(gradient.T, x.T) if need_weight else None
        db = gradient.sum(0) if ctx.has_bias and need_bias else None
        return dx, dw, db


class Linear(nn.Linear):
    """nn.Linear on `product`; same parameters, same names."""

    def forward(self, input: Tensor) -> Tensor:
        """y = x W^T + b."""
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return F.linear(input, self.weight, self.bias)
        return _Linear.apply(input, self.weight, self.bias)  # type: ignore[return-value]


def use_fast_linear(module: nn.Module) -> None:
    """Make every plain nn.Linear below `module` a Linear, in place, keeping its parameters."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
