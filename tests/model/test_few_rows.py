"""Second copies of matrices: the same products, in any company, adapters included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tunesmith.model.few_rows import FLOAT16_PRODUCTS, Halved, answer, kept_twice, steady_answer
from tunesmith.model.linear import BY_ONEDNN, ONEDNN, WIDE_VECTORS, Linear, product, steady_product, use_fast_linear
from tunesmith.model.lora import LoraLinear, LoraShape, attach_lora

ROOM = 1e9
halves = pytest.mark.skipif(not FLOAT16_PRODUCTS, reason="this processor has no products with float16 matrices")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(weight: Tensor) -> tuple[nn.Sequential, Linear]:
    """A model of one matrix."""
    whole = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    use_fast_linear(whole)
    layer = whole[0]
    assert isinstance(layer, Linear)
    layer.weight = nn.Parameter(weight)
    return whole, layer


def published(*shape: int) -> Tensor:
    """Weights as a checkpoint in bfloat16 holds them, some of them tiny."""
    spread = 10.0 ** (randn(*shape, seed=2).clamp(-2, 0) * 3)
    return (0.3 * randn(*shape, seed=1) * spread).bfloat16().float()


@halves
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 31, 64, 300])
def test_a_published_matrix_is_kept_in_half_the_bytes_and_multiplies_as_before(rows: int, stored: torch.dtype) -> None:
    weight, x = published(160, 96), randn(rows, 96)
    whole, layer = one_layer(weight.to(stored))
    exact = x.double() @ weight.double().T
    with kept_twice(whole, ROOM, halve=True):
        assert isinstance(layer.again, Halved)
        for found in (answer(x, layer), steady_answer(x, layer)):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        alone = torch.cat([steady_answer(row[None], layer) for row in x])
        assert torch.equal(steady_answer(x, layer), alone)
        assert torch.equal(steady_answer(x.flip(0), layer), alone.flip(0))
    assert layer.again is None


@halves
@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40), st.booleans())
@example([2.0**38, 2.0**-126], True)
def test_a_matrix_is_halved_only_if_no_number_of_it_changes(numbers: list[float], narrow: bool) -> None:
    weight = torch.tensor(numbers)[:, None]
    whole, layer = one_layer(weight.bfloat16().float() if narrow else weight)
    with kept_twice(whole, ROOM, halve=True):
        if isinstance(layer.again, Halved):
            assert torch.equal(layer.again.product(torch.ones(1, 1))[0], layer.weight[:, 0].detach())


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_a_reordered_matrix_gives_the_same_bits_in_any_company(rows: int) -> None:
    whole, only = one_layer(randn(160, 96, seed=1))
    x = randn(rows, 96)
    expected, steady = product(x, only.weight), steady_product(x, only.weight)
    with kept_twice(whole, ROOM, halve=True):
        assert isinstance(only.again, Tensor) == BY_ONEDNN
        assert torch.equal(answer(x, only), expected)
    with kept_twice(whole, ROOM, halve=True, steady=True):
        assert isinstance(only.again, Tensor) == (ONEDNN and WIDE_VECTORS)
        assert torch.equal(steady_answer(x, only), steady)
        for part in (1, 2, rows // 2):
            assert torch.equal(steady_answer(x[:part], only), steady[:part])
    assert only.again is None


@pytest.mark.parametrize("rows", [1, 2, 40, 100])
@pytest.mark.parametrize("halve", [True, False])
def test_an_adapter_answers_through_a_second_copy_as_through_the_first(halve: bool, rows: int) -> None:
    whole, layer = one_layer(published(24, 16))
    attach_lora(whole, LoraShape(rank=2, alpha=4.0))
    assert isinstance(layer, LoraLinear)
    with torch.no_grad():
        layer.lora_b.copy_(randn(24, 2, seed=3))
        x = randn(rows, 16)
        for enabled in (True, False):
            layer.enabled = enabled
            expected = whole(x)
            with kept_twice(whole, ROOM, halve=halve):
                torch.testing.assert_close(layer.answer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weight", "room"), [(randn(160, 96), 0), (randn(160, 96).half(), 0)])
def test_matrices_stay_single_where_there_is_no_room(weight: Tensor, room: float) -> None:
    whole, layer = one_layer(weight)
    with kept_twice(whole, room, halve=True):
        assert layer.again is None
