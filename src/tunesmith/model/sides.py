"""The two halves of a llama block as autograd functions, each with its gradient written out.

    into attention      q, k, v = turn(W_q n), turn(W_k n), W_v n              n = norm(x)
    out of attention    x + W_o seen
    gated layer         x + W_down (silu(W_gate n) * W_up n)                   n = norm(x)

Every W is a matrix, or a frozen matrix and an adapter W + s B A (lora.py has its gradient); a frozen one may be in 8
bits with a step for each row (linear.py). What is cheap to make again from x is not kept for the backward pass: neither
n nor the product of gate and up. Adapters that read the same n are multiplied together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .kernels import compiled_on_gpu
from .linear import add_product, product, stepped, stepped_, weight_slope


class Dense(NamedTuple):
    """y = W x + scale B A x, without the second part where there is no adapter."""

    weight: Tensor
    steps: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    @property
    def rank(self) -> int:
        """Columns that the adapter needs; 0 without one."""
        return 0 if self.a is None else self.a.shape[0]


def into_attention(
    x: Float[Tensor, "T D"],
    norm: Tensor,
    epsilon: float,
    turn: tuple[Float[Tensor, "T 1 d"], Float[Tensor, "T 1 d"]],
    layers: Sequence[Dense],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, turned by their positions (Su et al. 2021, arXiv 2104.09864), and values, each [T heads d].

    `turn` holds cos and sin, the first half of sin negative.
    """
    return _IntoAttention.apply(x, norm, epsilon, *turn, *_flat(layers))  # type: ignore[return-value]


def out_of_attention(x: Float[Tensor, "T D"], seen: Float[Tensor, "T K"], layer: Dense) -> Float[Tensor, "T D"]:
    """x + W seen."""
    return _OutOfAttention.apply(x, seen, *_flat([layer]))  # type: ignore[return-value]


def gated(x: Float[Tensor, "T D"], norm: Tensor, epsilon: float, layers: Sequence[Dense]) -> Float[Tensor, "T D"]:
    """x + down(silu(gate(n)) up(n)) of the normalised n (Shazeer 2020, arXiv 2002.05202)."""
    return _Gated.apply(x, norm, epsilon, *_flat(layers))  # type: ignore[return-value]


class _IntoAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, cos: Tensor, sin: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = _dense(flat)
        root, normal = _normalised(x, norm, epsilon)
        (q, k, v), low = _fan(normal, layers)
        ctx.save_for_backward(x, norm, root, low, cos, sin, *_tensors(layers))
        ctx.scales = [layer.scale for layer in layers]
        q, k, v = (part.unflatten(-1, (-1, cos.shape[-1])) for part in (q, k, v))
        return _turned(q, cos, sin), _turned(k, cos, sin), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, root, low, cos, sin, *tensors = ctx.saved_tensors
        layers = _saved(tensors, ctx.scales)
        q, k = (_turned_back(part, cos, sin) for part in grads[:2])
        slopes = [part.reshape(len(x), -1) for part in (q, k, grads[2])]
        inner, of_layers = _fan_back(_normal(x, root, norm), low, layers, slopes)
        dx, d_norm = _norm_back(inner, x, root, norm, None)
        return dx, d_norm, None, None, None, *of_layers


class _OutOfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, *flat: Any) -> Tensor:
        layers = _dense(flat)
        (y,), low = _fan(seen, layers)
        ctx.save_for_backward(seen, low, *_tensors(layers))
        ctx.scales = [layer.scale for layer in layers]
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, *tensors = ctx.saved_tensors
        d_seen, of_layers = _fan_back(seen, low, _saved(tensors, ctx.scales), [grads[0]])
        return grads[0], d_seen, *of_layers


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, epsilon: float, *flat: Any) -> Tensor:
        *wide, down = _dense(flat)
        root, normal = _normalised(x, norm, epsilon)
        (gate, up), low = _fan(normal, wide)
        (y,), low_down = _fan(_opened(gate, up), [down])
        ctx.save_for_backward(x, norm, root, gate, up, low, low_down, *_tensors([*wide, down]))
        ctx.scales = [layer.scale for layer in (*wide, down)]
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, root, gate, up, low, low_down, *tensors = ctx.saved_tensors
        *wide, down = _saved(tensors, ctx.scales)
        silu, opened = _opened_again(gate, up)
        slope, of_down = _fan_back(opened, low_down, [down], [grads[0]])
        slopes = _opened_back(slope, gate, up, silu)
        inner, of_wide = _fan_back(_normal(x, root, norm), low, wide, slopes)
        dx, d_norm = _norm_back(inner, x, root, norm, grads[0])
        return dx, d_norm, None, *of_wide, *of_down


def _fan(x: Tensor, layers: Sequence[Dense]) -> tuple[list[Tensor], Tensor | None]:
    """What layers that read the same x give, and the A x of all their adapters side by side."""
    adapters = [layer.a for layer in layers if layer.a is not None]
    low = product(x, torch.cat(adapters)) if adapters else None
    out = [stepped_(product(x, layer.weight), layer.steps) for layer in layers]
    for y, layer, place in zip(out, layers, _places(layers), strict=True):
        if low is not None and layer.b is not None:
            y.addmm_(low[:, place], layer.b.T.to(y.dtype), alpha=layer.scale)
    return out, low


def _fan_back(
    x: Tensor, low: Tensor | None, layers: Sequence[Dense], slopes: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """From the gradients of what `_fan` gave to that of x, and to those of each layer's parts in `Dense`."""
    dx = product(stepped(slopes[0], layers[0].steps), layers[0].weight.T)
    for layer, slope in zip(layers[1:], slopes[1:], strict=True):
        add_product(dx, stepped(slope, layer.steps), layer.weight.T)
    # Slices of `low` are copied: oneDNN takes a hundred times longer for rows with gaps between them.
    of_layers: list[Tensor | None] = []
    d_a: Tensor | None = None
    if low is not None:
        parts = [product(s, d.b.T).mul_(d.scale) for d, s in zip(layers, slopes, strict=True) if d.b is not None]
        d_low = torch.cat(parts, 1)
        dx.addmm_(d_low, torch.cat([layer.a for layer in layers if layer.a is not None]).to(dx.dtype))
        d_a = product(d_low.T, x.T)
    for layer, slope, place in zip(layers, slopes, _places(layers), strict=True):
        d_weight = weight_slope(layer.weight, slope, x) if layer.weight.requires_grad else None
        adapted = d_a is not None and low is not None and layer.b is not None
        # Not slope^T low, for which oneDNN would copy slope^T.
        d_b = product(low[:, place].T, slope.T).mul_(layer.scale).T if adapted else None  # type: ignore[index]
        of_layers += [d_weight, None, d_a[place] if adapted else None, d_b, None]  # type: ignore[index]
    return dx, of_layers


def _places(layers: Sequence[Dense]) -> Iterator[slice]:
    """Where each layer's adapter stands among those of all."""
    start = 0
    for layer in layers:
        yield slice(start, start + layer.rank)
        start += layer.rank


@compiled_on_gpu
def _normalised(x: Float[Tensor, "T D"], norm: Float[Tensor, "D"], epsilon: float) -> tuple[Tensor, Tensor]:
    """r = (mean(x^2) + eps)^-1/2 [T 1] in float32 or wider, and x r w."""
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
    root = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return root, (x * root).mul_(norm).to(x.dtype)


@compiled_on_gpu
def _normal(x: Float[Tensor, "T D"], root: Float[Tensor, "T 1"], norm: Float[Tensor, "D"]) -> Float[Tensor, "T D"]:
    return (x * root).mul_(norm).to(x.dtype)


@compiled_on_gpu
def _norm_back(
    slope: Tensor, x: Tensor, root: Tensor, norm: Tensor, beside: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dX of n = x r w with r = (mean(x^2) + eps)^-1/2 added to `beside`, and dw. Uses up `slope`."""
    d_norm = (slope * x).mul_(root).sum(0) if norm.requires_grad else None
    slope.mul_(norm)
    along = (slope * x).mean(-1, keepdim=True, dtype=root.dtype).mul_(root**3)
    dx = slope.mul_(root) if beside is None else torch.addcmul(beside, slope, root)
    return dx.addcmul_(x, along, value=-1).to(x.dtype), d_norm


@compiled_on_gpu
def _turned(part: Float[Tensor, "T h d"], cos: Float[Tensor, "T 1 d"], sin: Float[Tensor, "T 1 d"]) -> Tensor:
    return (part * cos).addcmul_(part.roll(part.shape[-1] // 2, -1), sin)


@compiled_on_gpu
def _turned_back(slope: Float[Tensor, "T h d"], cos: Float[Tensor, "T 1 d"], sin: Float[Tensor, "T 1 d"]) -> Tensor:
    return (slope * cos).add_((slope * sin).roll(slope.shape[-1] // 2, -1))


@compiled_on_gpu
def _opened(gate: Float[Tensor, "T W"], up: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    return F.silu(gate).mul_(up)


@compiled_on_gpu
def _opened_again(gate: Float[Tensor, "T W"], up: Float[Tensor, "T W"]) -> tuple[Tensor, Tensor]:
    silu = F.silu(gate)
    return silu, silu * up


@compiled_on_gpu
def _opened_back(slope: Tensor, gate: Tensor, up: Tensor, silu: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. Uses up `slope`."""
    return torch.ops.aten.silu_backward(slope * up, gate), slope.mul_(silu)


def _flat(layers: Sequence[Dense]) -> list[Any]:
    return [part for layer in layers for part in layer]


def _dense(flat: Sequence[Any]) -> list[Dense]:
    size = len(Dense._fields)
    return [Dense(*flat[at : at + size]) for at in range(0, len(flat), size)]


def _tensors(layers: Sequence[Dense]) -> list[Tensor | None]:
    return [part for layer in layers for part in layer[:-1]]


def _saved(tensors: Sequence[Any], scales: Sequence[float]) -> list[Dense]:
    parts = iter(tensors)
    return [Dense(*of_one) for of_one in zip(parts, parts, parts, parts, scales, strict=True)]
