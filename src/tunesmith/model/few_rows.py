"""Matrices that few rows meet again and again, as when answers are drawn, kept a second time in a form made for that.

A product of few rows takes as long as its matrix takes to be read. Published weights are mostly bfloat16, whose numbers
float16 holds too once they are scaled by a power of two, so half the bytes say the same: the products are those of the
float32 matrix, added up in float32. Where that would lose anything, or the rows are more than a few, the second copy is
float32 in the order that oneDNN likes, with the very sums of its products of the first, and with the adapter in it;
where MKL multiplies as fast (linear.py), only for `steady_answer`. docs/speed.md has the rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .linear import (
    BY_ONEDNN,
    FEW_ROWS,
    ONEDNN,
    WIDE_VECTORS,
    Linear,
    met_as,
    product,
    steady_product,
    stepped_,
    wide_product,
)

FLOAT16_PRODUCTS = torch.backends.quantized.engine in ("x86", "fbgemm")  # float16 by float32 numbers: FBGEMM alone
LARGEST_EXPONENT = 15  # float16 holds numbers below 2^16
GLANCE_ROWS = 8


@dataclass(frozen=True, slots=True)
class Halved:
    """A matrix times `scale` in float16. A row's product has the same bits in any company."""

    packed: Any
    scale: float

    def product(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M N"]:
        """x W^T."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed).mul_(1 / self.scale)


def answer(x: Float[Tensor, "M K"], layer: nn.Linear) -> Float[Tensor, "M N"]:
    """x W^T of the layer by `product`, without its bias; with its adapter where x `meets_whole`.

    A copy that is a Tensor is in oneDNN's order.
    """
    again, steps = (layer.again, layer.steps) if isinstance(layer, Linear) else (None, None)
    if isinstance(again, Halved) and 0 < len(x) <= FEW_ROWS:
        return again.product(x)
    if isinstance(again, Tensor) and len(x) > 1:
        return product(x, again)
    return stepped_(product(x, layer.weight), steps)


def meets_whole(x: Float[Tensor, "M K"], layer: Linear) -> bool:
    """Whether `answer` multiplies x with a matrix that holds the adapter: not a single row, slower there than plain."""
    return isinstance(layer.again, Tensor) and len(x) > 1


def wide_answer(x: Float[Tensor, "M K"], layer: nn.Linear) -> Float[Tensor, "M N"]:
    """`answer` in float32: logits, which bfloat16 would round by some hundredths."""
    return wide_product(x, layer.weight) if x.is_cuda else answer(x, layer).float()


def steady_answer(x: Float[Tensor, "M K"], layer: nn.Linear) -> Float[Tensor, "M N"]:
    """x W^T of the layer without its bias; a row's result does not depend on how many others there are."""
    again, steps = (layer.again, layer.steps) if isinstance(layer, Linear) and len(x) else (None, None)
    if isinstance(again, Halved):
        return again.product(x)
    return stepped_(steady_product(x, layer.weight), steps) if again is None else steady_product(x, again)


@contextmanager
def kept_twice(module: nn.Module, room_bytes: float, *, halve: bool, steady: bool = False) -> Iterator[None]:
    """Keep the matrices of `module` a second time for `answer`, or `steady_answer`, if there is room and it is faster.

    Weights and adapters must not change meanwhile. `halve` takes a second more for 100 M weights.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Linear) and layer.weight.is_cpu]
    layers = [layer for layer in layers if layer.again is None and met_as(layer.weight) == torch.float32]
    numbers = sum(layer.weight.numel() for layer in layers)
    reorders = (BY_ONEDNN or (steady and ONEDNN and WIDE_VECTORS)) and 4 * numbers < room_bytes
    try:
        for layer in layers:
            if halve and 2 * numbers < room_bytes:
                layer.again = _halved(layer.frozen)
            if layer.again is None and reorders and layer.weight.dtype == torch.float32:
                layer.again = torch.ops.mkldnn._reorder_linear_weight(layer.whole, FEW_ROWS)
        yield
    finally:
        for layer in layers:
            layer.again = None


@torch.no_grad()
def _halved(weight: Float[Tensor, "N K"]) -> Halved | None:
    """The matrix in float16 if no number of it changes."""
    largest = float(weight.abs().amax())
    if not FLOAT16_PRODUCTS or not 0 < largest < math.inf:
        return None
    scale = 2.0 ** min(LARGEST_EXPONENT - math.frexp(largest)[1], 100)
    for rows in (GLANCE_ROWS, len(weight)):  # most that will not do show it at once
        wide = weight[:rows].float()
        scaled = wide * scale
        if not torch.equal(scaled.half().float() / scale, wide):
            return None
    return Halved(torch.ops.quantized.linear_prepack_fp16(scaled, None), scale)
