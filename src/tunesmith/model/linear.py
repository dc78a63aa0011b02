"""Linear layers whose matrix products run at the machine's rate.

PyTorch sends float32 products on a CPU to MKL, which uses AVX-512 on Intel's processors and stays at AVX2 on others.
oneDNN, in the same build, uses AVX-512 wherever there is any; else it is the slower of the two, but for very wide
outputs. At AVX2 a few rows go faster as columns. Every way is true float32; docs/speed.md has the rates on each kind of
machine.

Where few rows meet a matrix again and again it may be kept a second time, in a form made for that (few_rows.py).

A frozen matrix may be stored in bfloat16 or float16. It is widened to float32 slice by slice as it is multiplied, which
loses nothing: the sums are those of a matrix stored in float32, bit for bit. Or it holds whole numbers of 8 bits, with
a step for each row (eight_bits.py): products are of whole numbers, and the steps are multiplied with what has a number
for each row, the output or its gradient.

Only where it is asked for (`products_in`) are numbers rounded to bfloat16 before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from ..processor import cpu_fact

ONEDNN = torch.backends.mkldnn.is_available()
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
BY_ONEDNN = ONEDNN and WIDE_VECTORS and cpu_fact("vendor_id") != "GenuineIntel"
AMX = ONEDNN and "amx_bf16" in cpu_fact("flags").split()  # multiplies bfloat16 several times faster than float32
FEW_ROWS, MANY_COLUMNS = 64, 16_384
SLICE, LARGE_SLICE = 2**19, 2**25  # numbers widened at once: as many as stay in the cache, or as are quickly multiplied

Precision = Literal["float32", "bfloat16"]
_precision: ContextVar[Precision] = ContextVar("precision", default="float32")


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """In bfloat16, products on a CPU with AMX round what they multiply, and add up in float32; others stay exact."""
    before = _precision.set(precision if AMX else "float32")
    try:
        yield
    finally:
        _precision.reset(before)


def product(x: Float[Tensor, "M K"], weight: Num[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """x @ weight.T without autograd. `weight` may be a transposed view, stored in fewer bits than x, or reordered."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.shape[0]:
        return x @ weight.to(x.dtype).T
    if weight.is_mkldnn:
        return _onednn(x, weight)
    if _precision.get() == "bfloat16":
        return _rounded(x, weight)
    if BY_ONEDNN or (ONEDNN and weight.shape[0] >= MANY_COLUMNS):
        return _widened(_onednn, x, weight)
    return _widened(_as_columns if not WIDE_VECTORS and 1 < x.shape[0] <= FEW_ROWS else F.linear, x, weight)


def stepped(y: Float[Tensor, "M N"], steps: Float[Tensor, "N"] | None) -> Float[Tensor, "M N"]:
    """y with each column times the step of the matrix's row that it belongs to; y itself where there are no steps."""
    return y if steps is None else y * steps


def stepped_(y: Float[Tensor, "M N"], steps: Float[Tensor, "N"] | None) -> Float[Tensor, "M N"]:
    """`stepped` in place, where y has just been made and memory need not be touched twice."""
    return y if steps is None else y.mul_(steps)


def wide_product(x: Float[Tensor, "M K"], weight: Num[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """`product` whose sums are given as they are added up, in float32 also where a GPU multiplies in bfloat16."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.to(x.dtype).T, out_dtype=torch.float32)
    return product(x, weight)


def add_product(y: Float[Tensor, "M N"], x: Float[Tensor, "M K"], weight: Num[Tensor, "N K"]) -> None:
    """y += x @ weight.T, on a GPU within the product."""
    if y.is_cuda:
        y.addmm_(x, weight.to(x.dtype).T)
    else:
        y += product(x, weight)


def steady_product(x: Float[Tensor, "M K"], weight: Num[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """`product` in which, in float32 on a CPU, a row's result does not depend on how many others there are.

    oneDNN adds up in the same order for two rows and more, and a single one is given a twin.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.shape[0] or not ONEDNN:
        return product(x, weight)
    if x.shape[0] == 1:
        return steady_product(x.expand(2, -1).contiguous(), weight)[:1]
    return _widened(_onednn, x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _rounded(x: Tensor, weight: Tensor) -> Tensor:
    """Rounded before they are multiplied; where bfloat16 holds the matrix as it is, the sums are rounded as well."""
    if weight.dtype in (torch.bfloat16, torch.int8):
        return _widened(_onednn, x.bfloat16(), weight).float()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"  # for this product only: the small ones of attention would take ten times as long
    try:
        return _widened(_onednn, x, weight)
    finally:
        matmul.fp32_precision = before


def _as_columns(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.T).T.contiguous()


def _widened(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """multiply(x, weight), of a narrower `weight` with as many rows at a time as are widened at once."""
    if weight.dtype == x.dtype:
        return multiply(x, weight)
    size = SLICE if len(x) <= FEW_ROWS else LARGE_SLICE
    parts = weight.split(max(1, size // weight.shape[1]))
    return torch.cat([multiply(x, part.to(x.dtype)) for part in parts], 1)


def met_as(weight: Tensor) -> torch.dtype:
    """The type in which `weight` is multiplied: on a CPU float32, however it is stored; on a GPU never 8 bits."""
    narrow = torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype
    return torch.float32 if weight.device.type == "cpu" else narrow


def weight_slope(weight: Num[Tensor, "N K"], slope: Float[Tensor, "M N"], x: Float[Tensor, "M K"]) -> Tensor | None:
    """slope.T @ x; on a GPU added to the gradient that `weight` has already, within the product, and then None."""
    if weight.is_cuda and weight.grad is not None:
        weight.grad.addmm_(slope.T, x)
        return None
    return product(slope.T, x.T)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with dX = dY W and dW = dY^T X. `steps` are a frozen matrix's in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, steps: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if weight.requires_grad else None, weight, steps)
        ctx.has_bias = bias is not None
        y = stepped_(product(flat, weight), steps)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, steps = ctx.saved_tensors
        gradient = grads[0].reshape(-1, weight.shape[0])
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        into = (*grads[0].shape[:-1], weight.shape[1])
        dx = product(stepped(gradient, steps), weight.T).view(into) if need_x else None
        dw = product(gradient.T, x.T) if need_weight else None
        db = gradient.sum(0) if ctx.has_bias and need_bias else None
        return dx, dw, db, None


class Linear(nn.Linear):
    """nn.Linear on `product`; same parameters, same names. `again` is the weight once more (few_rows.py).

    Where there are `steps` [out], `weight` holds whole numbers of 8 bits, each a multiple of its row's step.
    """

    again: Any = None
    steps: Tensor | None = None

    @property
    def frozen(self) -> Tensor:
        """The base's matrix; in float32 where it is kept in 8 bits."""
        weight = self.weight.detach()
        return weight if self.steps is None else weight * self.steps[:, None].float()

    @property
    def whole(self) -> Tensor:
        """The matrix that the layer multiplies with."""
        return self.frozen

    def forward(self, input: Tensor) -> Tensor:
        """y = x W^T + b."""
        if self.steps is None and (input.device.type != "cpu" or input.dtype != torch.float32):
            return F.linear(input, self.weight, self.bias)
        return _Linear.apply(input, self.weight, self.bias, self.steps)  # type: ignore[return-value]


class Embedding(nn.Embedding):
    """nn.Embedding that widens the rows it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        """A row of the matrix for each index."""
        return super().forward(input).to(met_as(self.weight))


def use_fast_linear(module: nn.Module) -> None:
    """Make every plain nn.Linear below `module` a Linear, in place, keeping its parameters."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear


def widen_others(module: nn.Module) -> None:
    """Make float32, in place, what is no matrix of a Linear or of a plain nn.Embedding, and that an Embedding."""
    for child in module.modules():
        if type(child) is nn.Embedding:
            child.__class__ = Embedding
    stay = {child.weight for child in module.modules() if isinstance(child, (Linear, Embedding))}
    for tensor in {*module.parameters(), *module.buffers()} - stay:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
