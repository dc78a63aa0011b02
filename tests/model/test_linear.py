"""The fast product and the two hand-written backward passes, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunesmith.model.linear import (
    AMX,
    Linear,
    product,
    products_in,
    steady_product,
    use_fast_linear,
)
from tunesmith.model.lora import LoraShape, attach_lora


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(layer: nn.Module, exact: nn.Module, x: Tensor) -> None:
    """Outputs and all gradients of `layer` and of its float64 twin."""
    one, other = x.clone().requires_grad_(), x.double().requires_grad_()
    y, z = layer(one), exact(other)
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    slope = randn(*y.shape, seed=9)
    (y * slope).sum().backward()
    (z * slope.double()).sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    twins = dict(exact.named_parameters())
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), twins[name].grad, rtol=1e-4, atol=1e-4)
        else:
            assert parameter.grad is None


class ExactLora(nn.Module):
    """W x + s B A x by plain autograd."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, parameter in layer.named_parameters():
            twin = nn.Parameter(parameter.detach().double(), requires_grad=parameter.requires_grad)
            self.register_parameter(name, twin)

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters.get("bias")
        y = nn.functional.linear(x, self.weight, bias)  # type: ignore[arg-type]
        return y + self.scale * (x @ self.lora_a.T) @ self.lora_b.T  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (0,)], ids=str)
def test_the_product_is_x_times_the_transpose(shape: tuple[int, ...]) -> None:
    x, weight = randn(shape[0], 7), randn(4, 7, seed=1)
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    transposed = randn(7, 4, seed=1).T
    torch.testing.assert_close(product(x, transposed), x @ transposed.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (1, 1, 8)], ids=str)
def test_linear_is_nn_linear_forward_and_backward(shape: tuple[int, ...], bias: bool) -> None:
    holder = nn.Sequential(nn.Linear(8, 5, bias=bias))
    exact = nn.Linear(8, 5, bias=bias).double()
    exact.load_state_dict(holder[0].state_dict())
    use_fast_linear(holder)
    assert type(holder[0]) is Linear
    compare(holder[0], exact, randn(*shape))


def test_a_frozen_linear_passes_the_gradient_on_and_keeps_none() -> None:
    layer = Linear(8, 5)
    exact = nn.Linear(8, 5).double()
    exact.load_state_dict(layer.state_dict())
    layer.requires_grad_(False)
    compare(layer, exact, randn(6, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)], ids=str)
def test_a_lora_layer_is_plain_autograd_of_its_formula(shape: tuple[int, ...], bias: bool) -> None:
    holder = nn.Sequential(Linear(8, 5, bias=bias))
    attach_lora(holder, LoraShape(rank=3, alpha=6.0))
    layer = holder[0]
    with torch.no_grad():
        layer.lora_b.copy_(randn(5, 3, seed=2))  # type: ignore[union-attr,operator]
    compare(layer, ExactLora(layer, 2.0), randn(*shape))


def test_adapters_stay_float32_on_a_bfloat16_base() -> None:
    holder = nn.Sequential(Linear(8, 5)).bfloat16()
    attach_lora(holder, LoraShape(rank=2, alpha=4.0))
    x = randn(6, 8).bfloat16().requires_grad_()
    y = holder(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    layer = holder[0]
    assert x.grad is not None
    assert layer.lora_a.dtype == layer.lora_b.grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [(64, 64), (49, 8), (8, 576), (3000, 96)], ids=str)
def test_a_rows_product_has_the_same_bits_alone_and_among_others(size: tuple[int, int]) -> None:
    weight, x = randn(*size, seed=1), randn(300, size[1])
    alone = torch.cat([steady_product(row[None], weight) for row in x])
    for count in (2, 3, 7, 16, 33, 100, 300):
        assert torch.equal(steady_product(x[:count], weight), alone[:count])
        assert torch.equal(steady_product(x[-count:].flip(0), weight), alone[-count:].flip(0))


@pytest.mark.parametrize("rows", [5, 200])
def test_only_where_it_is_asked_for_a_product_is_of_rounded_numbers(rows: int) -> None:
    x, weight = randn(rows, 96), randn(64, 96, seed=1)
    before = product(x, weight)
    with products_in("bfloat16"):
        found = product(x, weight)
    rounds = torch.bfloat16 if AMX else torch.float32
    exact = x.to(rounds).double() @ weight.to(rounds).double().T
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    assert product(x, weight).equal(before)
    torch.testing.assert_close(before.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def test_a_matrix_stored_in_bfloat16_is_multiplied_as_it_is() -> None:
    x, slope, weight = randn(40, 96), randn(40, 64, seed=2), randn(64, 96, seed=1).bfloat16()
    with products_in("bfloat16"):
        found, back = product(x, weight), product(slope, weight.T)
    assert found.dtype == back.dtype == torch.float32
    rounds, near = (torch.bfloat16, 2**-8) if AMX else (torch.float32, 1e-5)
    one, other = (part.to(rounds).double() for part in (x, slope))
    torch.testing.assert_close(found.double(), one @ weight.double().T, rtol=near, atol=1e-4)
    torch.testing.assert_close(back.double(), other @ weight.double(), rtol=near, atol=1e-4)


def test_gradients_are_of_rounded_numbers_too() -> None:
    x, weight, slope = randn(40, 96).requires_grad_(), randn(64, 96, seed=1), randn(40, 64, seed=2)
    layer = Linear(96, 64, bias=False)
    layer.weight.data = weight
    with products_in("bfloat16"):
        (layer(x) * slope).sum().backward()
    rounds = torch.bfloat16 if AMX else torch.float32
    one, two, three = (part.detach().to(rounds).double() for part in (x, weight, slope))
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), three @ two, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), three.T @ one, rtol=1e-5, atol=1e-4)
