"""Passes over a few new tokens on a CPU, with everything between the matrix products of a block compiled by Numba.

For two norms, the rotation and attention to keys in a cache PyTorch takes some fifty small operations a block, which
together last as long as the products. Here each token is worked off by itself, so its numbers do not depend on what
else is in the pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .blocks import Blocks, linear
from .cache import Cache
from .fused import RmsNorm

F32 = np.float32
Arrays = tuple[np.ndarray, np.ndarray]
_HOW: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "error_model": "numpy"}


@torch.no_grad()
def compiled_pass(
    blocks: Blocks,
    cache: Cache,
    tokens: Int[Tensor, "N"],
    positions: Int[Tensor, "N"],
    slots: Int[np.ndarray, "N"],
    places: Int[np.ndarray, "N"],
) -> Float[Tensor, "N D"]:
    """Final hidden states of new tokens, each in a slot whose row holds `places` tokens before it, after the prefix.

    Keys and values are filed in the cache.
    """
    x = blocks.embed(tokens)
    turn = tuple(part[:, 0].contiguous().numpy() for part in blocks.turn(x, positions))
    late = torch.zeros_like(x)  # what is still to be added to x
    for layer, block in enumerate(blocks.blocks):
        normal = _normalised_sum(x, late, block.norm)
        q, k, v = (linear(part, normal) for part in (block.q, block.k, block.v))
        held, before = _held(cache, layer, k.unflatten(-1, (-1, block.head_size)).transpose(0, 1))
        seen = torch.empty_like(q)
        fresh = (q.numpy(), k.numpy(), v.numpy())
        _attend(fresh, turn, held, before, (slots, places), F32(block.scaling), seen.numpy())
        late = linear(block.o, seen)
        normal = _normalised_sum(x, late, block.norm_again)
        late = linear(block.down, F.silu(linear(block.gate, normal)).mul_(linear(block.up, normal)))
    return _normalised_sum(x, late, blocks.norm)


def _held(cache: Cache, layer: int, key: Float[Tensor, "G N d"]) -> tuple[Arrays, Arrays]:
    """Keys and values of the slots, and of the prefix, which may be empty."""
    before = cache.prefix.get(layer) or (key[:, :0].contiguous(),) * 2
    keys, values = cache.layer(layer, key)
    return (keys.numpy(), values.numpy()), (before[0].numpy(), before[1].numpy())


def _normalised_sum(x: Float[Tensor, "N D"], late: Float[Tensor, "N D"], norm: RmsNorm) -> Float[Tensor, "N D"]:
    """x / rms(x) * weight once x has become x + late."""
    out = torch.empty_like(x)
    _add_and_norm(x.numpy(), late.numpy(), norm.weight.detach().numpy(), F32(norm.variance_epsilon), out.numpy())
    return out


def _part(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the compiled ones. Sums may be added up in any order."""
    return numba.njit(**_HOW)(inspect.unwrap(function))  # from the checks of types in tests


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Machine code, made now or found in Numba's cache, which lies where Python keeps its own."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, cache=True, **_HOW)(inspect.unwrap(function))
        except Exception:  # nowhere to keep it, or damaged there; what is wrong with the code itself shows again
            return numba.njit(signature, **_HOW)(inspect.unwrap(function))

    return compiled


@_part
def _turn(x, cos, sin, scale, out):  # type: ignore[no-untyped-def]
    """Rotate a head by its position (Su et al. 2021, arXiv 2104.09864); the first half of `sin` is negative."""
    half = len(x) // 2
    for i in range(half):
        out[i] = (x[i] * cos[i] + x[i + half] * sin[i]) * scale
        out[i + half] = (x[i + half] * cos[i + half] + x[i] * sin[i + half]) * scale


@_part
def _dots(x, rows, count, out):  # type: ignore[no-untyped-def]
    """out[t] = x . rows[t] for the first `count`; four at a time, as one after the other would wait for its sum."""
    four = count // 4 * 4
    for t in range(0, four, 4):
        a = b = c = d = F32(0)
        for i in range(len(x)):
            a += x[i] * rows[t, i]
            b += x[i] * rows[t + 1, i]
            c += x[i] * rows[t + 2, i]
            d += x[i] * rows[t + 3, i]
        out[t], out[t + 1], out[t + 2], out[t + 3] = a, b, c, d
    for t in range(four, count):
        a = F32(0)
        for i in range(len(x)):
            a += x[i] * rows[t, i]
        out[t] = a


@_part
def _add_weighted(weights, rows, count, out):  # type: ignore[no-untyped-def]
    """out += sum of weights[t] rows[t] over the first `count`."""
    four = count // 4 * 4
    for t in range(0, four, 4):
        a, b, c, d = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for i in range(len(out)):
            out[i] += a * rows[t, i] + b * rows[t + 1, i] + c * rows[t + 2, i] + d * rows[t + 3, i]
    for t in range(four, count):
        for i in range(len(out)):
            out[i] += weights[t] * rows[t, i]


@_part
def _exponentials(logits):  # type: ignore[no-untyped-def]
    """exp(logits - their maximum) in place, and the sum.

    exp(x) = 2^n exp(r) with |r| <= ln(2) / 2 and a polynomial for exp(r), as this is done for many numbers at a time
    and math.exp for one; 2^n is a float32 whose exponent bits are n + 127.
    """
    peak, mass = logits[0], F32(0)
    for logit in logits:
        peak = max(peak, logit)
    bits = np.empty(len(logits), np.int32)
    for t in range(len(logits)):
        x = logits[t] - peak
        if x < F32(-87):  # below the smallest float32
            x = F32(-87)
        n = np.floor(x * F32(1.44269504) + F32(0.5))
        bits[t] = np.int32(np.int32(n) + np.int32(127)) << np.int32(23)
        r = x - n * F32(0.693147181)
        p = F32(1 / 720) * r + F32(1 / 120)
        p = (((p * r + F32(1 / 24)) * r + F32(1 / 6)) * r + F32(0.5)) * r + F32(1)
        logits[t] = p * r + F32(1)
    powers = bits.view(np.float32)
    for t in range(len(logits)):
        logits[t] *= powers[t]
        mass += logits[t]
    return mass


@_compiled("void(f4[:,::1], f4[:,::1], f4[::1], f4, f4[:,::1])")
def _add_and_norm(x, late, weight, epsilon, out):  # type: ignore[no-untyped-def]
    rows, width = x.shape
    for n in range(rows):
        square = F32(0)
        for i in range(width):
            x[n, i] += late[n, i]
            square += x[n, i] * x[n, i]
        root = F32(1) / math.sqrt(square / F32(width) + epsilon)
        for i in range(width):
            out[n, i] = x[n, i] * root * weight[i]


@_compiled(
    "void(UniTuple(f4[:,::1], 3), UniTuple(f4[:,::1], 2), UniTuple(f4[:,:,:,::1], 2), UniTuple(f4[:,:,::1], 2),"
    "UniTuple(i8[::1], 2), f4, f4[:,::1])"
)
def _attend(fresh, turn, held, before, where, scaling, out):  # type: ignore[no-untyped-def]
    """File turned keys and values of all tokens, then let them attend to what their rows hold.

    `fresh` are q [N H*d], k and v [N G*d]; `turn` cos and sin [N d]; `held` keys and values [slots G C d], `before`
    those of the prefix [G P d]; `where` slots and places [N]; `out` becomes [N H*d].
    """
    (q, k, v), (cos, sin), (slots, places) = fresh, turn, where
    groups, _, size = held[0].shape[1:]
    heads, shared = q.shape[1] // size, before[0].shape[1]
    for n in range(len(q)):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            _turn(k[n, part], cos[n], sin[n], F32(1), held[0][slots[n], g, places[n]])
            held[1][slots[n], g, places[n]] = v[n, part]
    turned = np.empty(size, F32)
    weights = np.empty(shared + places.max() + 1, F32)
    for n in range(len(q)):
        own = places[n] + 1
        for h in range(heads):
            g, part = h * groups // heads, slice(h * size, (h + 1) * size)
            _turn(q[n, part], cos[n], sin[n], scaling, turned)
            _dots(turned, before[0][g], shared, weights)
            _dots(turned, held[0][slots[n], g], own, weights[shared:])
            mass = _exponentials(weights[: shared + own])
            seen = out[n, part]
            seen[:] = 0
            _add_weighted(weights, before[1][g], shared, seen)
            _add_weighted(weights[shared:], held[1][slots[n], g], own, seen)
            for i in range(size):
                seen[i] /= mass
