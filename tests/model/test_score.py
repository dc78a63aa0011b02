"""Log-probabilities in tiles against log_softmax in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import pack_one
from tunesmith.model.load import Model
from tunesmith.model.score import TILE, WIDE_TILE, all_log_probs, score, target_log_probs
from tunesmith.types import Example


def problem(rows: int, width: int = 16, words: int = 53, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * scale
    weight = torch.randn(words, width, generator=generator) * scale
    targets = torch.randint(0, words, (rows,), generator=generator)
    slope = torch.randn(rows, generator=generator)
    return hidden, weight, targets, slope


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 3, WIDE_TILE, WIDE_TILE + 1])
def test_values_and_gradients_are_those_of_log_softmax_across_tile_edges(rows: int) -> None:
    hidden, weight, targets, slope = problem(rows)
    one, other = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_probs = target_log_probs(one, other, targets)
    (log_probs * slope).sum().backward()
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = oracle(exact_hidden, exact_weight, targets)
    (exact * slope.double()).sum().backward()
    torch.testing.assert_close(log_probs.double(), exact, rtol=1e-5, atol=1e-5)
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)


@given(
    st.integers(1, 300), st.integers(1, 24), st.integers(2, 90), st.integers(0, 99), st.sampled_from([0.1, 1.0, 6.0])
)
def test_any_shape_and_scale_is_right(rows: int, width: int, words: int, seed: int, scale: float) -> None:
    hidden, weight, targets, _ = problem(rows, width, words, seed, scale)
    exact = oracle(hidden.double(), weight.double(), targets)
    largest = float((hidden @ weight.T).abs().max())
    rounding = 1e-5 + 4 * torch.finfo(torch.float32).eps * largest  # a log-probability is a difference of two logits
    torch.testing.assert_close(target_log_probs(hidden, weight, targets).double(), exact, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    hidden, weight, targets, slope = problem(5)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    (target_log_probs(hidden, weight, targets) * slope).sum().backward()
    assert (hidden.grad is not None) == (trained == "hidden")
    assert (weight.grad is not None) == (trained == "weight")


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets, _ = problem(3, scale=100.0)
    log_probs = target_log_probs(hidden, weight, targets)
    assert bool(torch.isfinite(log_probs).all())
    assert bool((log_probs <= 0).all())


def test_all_log_probs_are_log_softmax() -> None:
    hidden, weight, _, _ = problem(7)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    torch.testing.assert_close(all_log_probs(hidden, weight).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_tied_head_gets_the_gradient_of_both_its_uses(fresh_model: Model, tiny_examples: list[Example]) -> None:
    model = fresh_model
    assert model.head_weight is model.hf.get_input_embeddings().weight
    batch = pack_one(tiny_examples[:3])
    score(model, batch).log_probs.sum().backward()
    found = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
    model.hf.zero_grad()
    model.hf.set_attn_implementation("eager")
    total = torch.zeros(())
    for example in tiny_examples[:3]:
        tokens = torch.from_numpy(example.tokens)
        log_probs = torch.log_softmax(model.hf(tokens[None], use_cache=False).logits[0, :-1], -1)
        chosen = log_probs.gather(1, tokens[1:, None])[:, 0]
        total = total + (chosen * torch.from_numpy(example.weights)[1:]).sum()
    total.backward()
    assert set(found) == {name for name, _ in model.hf.named_parameters()}
    for name, parameter in model.hf.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
