"""The written-out gradients of a block's halves, against autograd in float64 and against the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.model.attention import PackedAttention
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.sides import Dense, gated, into_attention, out_of_attention
from tunesmith.tensors import Layout

LAYOUT = Layout(lengths=(5, 6, 4, 3), parents=(-1, 0, 0, -1))
POSITIONS = torch.cat([torch.arange(5), torch.arange(5, 11), torch.arange(5, 9), torch.arange(3)])
EPSILON, HEAD = 1e-5, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def layers(shapes: list[tuple[int, int]], adapted: list[bool], stepped: bool = False) -> list[Dense]:
    """With `stepped`, matrices are frozen, and each of their rows has a step."""
    parts = []
    for n, ((out, into), low_rank) in enumerate(zip(shapes, adapted, strict=True)):
        weight, steps = random(out, into, seed=n), random(out, seed=30 + n).detach() if stepped else None
        a, b = (random(2 + n, into, seed=10 + n), random(out, 2 + n, seed=20 + n)) if low_rank else (None, None)
        parts.append(Dense(weight.detach() if stepped else weight, steps, a, b, 0.5 + n if low_rank else 0.0))
    return parts


def apply(layer: Dense, x: Tensor) -> Tensor:
    y = x @ (layer.weight if layer.steps is None else layer.weight * layer.steps[:, None]).T
    return y if layer.a is None or layer.b is None else y + layer.scale * (x @ layer.a.T @ layer.b.T)


def normal(x: Tensor, norm: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * norm


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Values, and the gradients of a random sum of them."""
    slopes = [random(*part.shape, seed=99).detach() for part in found]
    torch.testing.assert_close(found, expected)
    sides = [torch.autograd.grad(part, inputs, slopes, allow_unused=True) for part in (found, expected)]
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs)


def parameters(parts: list[Dense]) -> list[Tensor]:
    return [
        part for layer in parts for part in (layer.weight, layer.a, layer.b) if part is not None and part.requires_grad
    ]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("adapted", [[True, True, True], [False, False, False], [True, False, True]])
def test_the_gated_half_has_the_gradients_of_its_formula(adapted: list[bool], stepped: bool) -> None:
    x, norm, parts = random(5, 6, seed=7), random(6, seed=8), layers([(9, 6), (9, 6), (6, 9)], adapted, stepped)
    n = normal(x, norm)
    expected = x + apply(parts[2], F.silu(apply(parts[0], n)) * apply(parts[1], n))
    agree((gated(x, norm, EPSILON, parts),), (expected,), [x, norm, *parameters(parts)])


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("adapted", [[True, True, True], [False, False, False], [False, True, False]])
def test_the_half_before_attention_has_the_gradients_of_its_formula(adapted: list[bool], stepped: bool) -> None:
    x, norm = random(5, 6, seed=7), random(6, seed=8)
    parts = layers([(2 * HEAD, 6), (HEAD, 6), (HEAD, 6)], adapted, stepped)
    angle = random(5, 1, HEAD // 2, seed=9).detach()
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    n = normal(x, norm)
    q, k, v = (apply(layer, n).unflatten(-1, (-1, HEAD)) for layer in parts)

    def turned(part: Tensor) -> Tensor:
        left, right = part.chunk(2, -1)
        return part * cos + torch.cat([-right, left], -1) * sin

    signed = torch.cat([-sin[..., : HEAD // 2], sin[..., HEAD // 2 :]], -1)
    found = into_attention(x, norm, EPSILON, (cos, signed), parts)
    agree(found, (turned(q), turned(k), v), [x, norm, *parameters(parts)])


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("adapted", [True, False])
def test_the_half_after_attention_has_the_gradients_of_its_formula(adapted: bool, stepped: bool) -> None:
    x, seen, (layer,) = random(5, 6, seed=7), random(5, 8, seed=8), layers([(6, 8)], [adapted], stepped)
    agree((out_of_attention(x, seen, layer),), (x + apply(layer, seen),), [x, seen, *parameters([layer])])


SCORED = torch.tensor([3, 4, 16, 9, 3])


def gradients(model: Model, *, own: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and every gradient of a fixed sum of them, through the model's modules or through the blocks."""
    model.hf.zero_grad(set_to_none=True)
    tokens, attend = torch.arange(18) * 7 % 290, PackedAttention(LAYOUT)
    if own:
        out = model.body(input_ids=tokens[None], position_ids=POSITIONS[None], use_cache=False, attend=attend)
        hidden = out.last_hidden_state[0][SCORED]
    else:
        assert model.blocks
        assert model.blocks.trains
        hidden = model.blocks.train(tokens, POSITIONS, attend, SCORED)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    named = model.hf.named_parameters()
    return hidden.detach(), {name: part.grad for name, part in named if part.grad is not None}


@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_packed_stream_trains_as_through_the_models_own_modules(fresh_model: Model, update: str) -> None:
    if update == "lora":
        attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
        for layer in lora_layers(fresh_model.hf).values():
            torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(1))
    expected, slopes = gradients(fresh_model, own=True)
    hidden, found = gradients(fresh_model, own=False)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        largest = float(slope.abs().max())
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5 * largest + 1e-6, msg=name)
