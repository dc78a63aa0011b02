"""PPO against plain loops in float64: advantages, clipping, the mix, and what a rollout is turned into."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import pack_groups
from tunesmith.methods.ppo import LAMBDA, SMALLEST_SPREAD, PpoLoss, adapted, gae, imitated, ppo_examples, whiten
from tunesmith.tensors import Batch, Scores
from tunesmith.types import Example

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]
NUMBER = st.floats(-5, 5, width=32)


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_double_sum_of_their_definition(
    steps: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    rewards, values = (np.array(column) for column in zip(*steps, strict=True))
    after = [*values[1:], 0.0]
    errors = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    wanted = [
        sum((gamma * lam) ** ahead * errors[t + ahead] for ahead in range(len(errors) - t)) for t in range(len(errors))
    ]
    np.testing.assert_allclose(gae(rewards, values, gamma, lam), wanted, rtol=1e-9, atol=1e-9)


@given(st.lists(NUMBER, min_size=1, max_size=20))
def test_with_lambda_one_advantages_are_what_comes_less_what_was_expected(rewards: list[float]) -> None:
    values = np.linspace(-1, 1, len(rewards))
    wanted = np.cumsum(rewards[::-1])[::-1] - values
    np.testing.assert_allclose(gae(np.array(rewards), values, 1.0, 1.0), wanted, atol=1e-9)


@given(st.lists(NUMBER, min_size=1, max_size=30))
def test_whitened_numbers_have_mean_zero_and_variance_one_unless_they_hardly_differ(numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float64)
    white = whiten(values)
    assert abs(white.mean()) < 1e-6
    assert white.var() == pytest.approx(min(1.0, values.var() / SMALLEST_SPREAD**2), abs=1e-6)
    np.testing.assert_allclose(white * max(values.std(), SMALLEST_SPREAD) + values.mean(), values, atol=1e-6)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 64 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 10_000)),
        (0.0, 0.1 * (1 - 0.00128)),
    ],
)
def test_the_penalty_grows_where_the_policy_is_too_far_away(seen: float, wanted: float) -> None:
    assert adapted(0.1, seen, 6.0, 64) == pytest.approx(wanted, rel=1e-12)


def rollout(answers: Makes, count: int = 3, seed: int = 0, spread: float = 0.3) -> list[tuple[Example, ...]]:
    """Answers with what sampling and the models before training said of them, made up."""
    draw = np.random.default_rng(seed)

    def filled(example: Example) -> Example:
        names = ("old_log_probs", "old_values", "reference")
        numbers = {name: (draw.normal(size=len(example.tokens)) * spread - 1) * example.weights for name in names}
        return replace(example, extra={name: values.astype(np.float32) for name, values in numbers.items()})

    return [tuple(map(filled, pair)) for pair in answers(count, seed)]


def test_a_rollout_becomes_advantages_and_returns_of_its_definition(answers: Makes) -> None:
    groups = rollout(answers)
    scores, kl = [1.0, -0.5, 0.25, 2.0, -1.0, 0.0], 0.3
    ready = ppo_examples(groups, scores, kl)
    assert [[e.id for e in group] for group in ready] == [[e.id for e in group] for group in groups]
    advantages, returns = [], []
    for example, final in zip(sum(groups, ()), scores, strict=True):
        at = np.flatnonzero(example.weights)
        old, reference, values = (
            [float(example.extra[name][t]) for t in at] for name in ("old_log_probs", "reference", "old_values")
        )
        given_ = [-kl * (p - q) for p, q in zip(old, reference, strict=True)]
        given_[-1] += final
        errors = [r + v2 - v1 for r, v1, v2 in zip(given_, values, [*values[1:], 0.0], strict=True)]
        mine = [sum(LAMBDA**n * error for n, error in enumerate(errors[t:])) for t in range(len(at))]
        advantages.append(mine)
        returns.append([a + v for a, v in zip(mine, values, strict=True)])
    every = np.concatenate(advantages)
    for example, mine, wanted in zip(sum(ready, ()), advantages, returns, strict=True):
        trained = example.weights > 0
        white = (np.array(mine) - every.mean()) / every.std()
        np.testing.assert_allclose(example.extra["advantages"][trained], white, atol=1e-5)
        np.testing.assert_allclose(example.extra["returns"][trained], wanted, atol=1e-5)
        assert not any(example.extra[name][~trained].any() for name in ("advantages", "returns", "mix"))


def losses_of(loss: PpoLoss, log_probs: list[float], values: list[float], batch: Batch) -> tuple[float, float, float]:
    """Loss, clipped ratios and value loss, token by token."""
    total, clipped, value_loss = 0.0, 0, 0.0
    numbers = {name: part.double().tolist() for name, part in batch.extra.items()}
    for s in range(len(log_probs)):
        if numbers["mix"][s] > 0:
            total -= numbers["mix"][s] * log_probs[s]
            continue
        advantage, ratio = numbers["advantages"][s], math.exp(log_probs[s] - numbers["old_log_probs"][s])
        bounded = min(max(ratio, 1 - loss.clip), 1 + loss.clip)
        old = numbers["old_values"][s]
        near = min(max(values[s], old - loss.value_clip), old + loss.value_clip)
        wanted = numbers["returns"][s]
        value = max((values[s] - wanted) ** 2, (near - wanted) ** 2) / 2
        total += max(-advantage * ratio, -advantage * bounded) + loss.value_weight * value
        clipped += abs(ratio - 1) > loss.clip
        value_loss += value
    return total, clipped, value_loss


def mixed(answers: Makes, seed: int) -> Batch:
    """A stream of sampled answers and of examples to imitate."""
    sampled = ppo_examples(rollout(answers, seed=seed), np.random.default_rng(seed).normal(size=6).tolist(), 0.1)
    shown = imitated([example for example, _ in answers(2, seed + 1)], 0.4)
    (batch,) = pack_groups([*sampled, *shown], budget_tokens=10_000)
    return batch


@settings(max_examples=30)
@given(
    st.integers(0, 999),
    st.sampled_from([PpoLoss(), PpoLoss(clip=0.1, value_clip=0.05, value_weight=1.0), PpoLoss(value_weight=0.0)]),
)
def test_the_loss_is_that_of_a_loop_over_tokens(answers: Makes, seed: int, loss: PpoLoss) -> None:
    batch = mixed(answers, seed)
    draw = torch.Generator().manual_seed(seed)
    log_probs = batch.extra["old_log_probs"] + torch.randn(len(batch.targets), generator=draw) * 0.3
    values = batch.extra["old_values"] + torch.randn(len(batch.targets), generator=draw) * 0.4
    terms = loss(Scores(parts={"log_probs": log_probs, "values": values}), batch)
    total, clipped, value_loss = losses_of(loss, log_probs.double().tolist(), values.double().tolist(), batch)
    sampled = (batch.extra["mix"] == 0).double()
    assert float(terms.sum) == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert terms.report["clipped"] == clipped
    assert terms.report["value_loss"] == pytest.approx(value_loss, rel=1e-4)
    change = (log_probs - batch.extra["old_log_probs"]).double() * sampled
    assert terms.report["squared_change"] == pytest.approx(float((change**2).sum()), rel=1e-4)


def test_only_sampled_tokens_count_and_imitated_ones_are_pulled_with_their_weight(answers: Makes) -> None:
    batch = mixed(answers, 3)
    shown = batch.extra["mix"] > 0
    assert PpoLoss().count(batch) == int((~shown).sum()) > 0
    assert torch.unique(batch.extra["mix"]).tolist() == pytest.approx([0.0, 0.4])
    log_probs, values = (torch.full_like(batch.weights, -1.0).requires_grad_() for _ in range(2))
    PpoLoss()(Scores(parts={"log_probs": log_probs, "values": values}), batch).sum.backward()
    assert log_probs.grad is not None
    assert values.grad is not None
    assert log_probs.grad[shown].tolist() == pytest.approx([-0.4] * int(shown.sum()))
    assert not values.grad[shown].any()


def gradient_at(ratio: float, advantage: float) -> float:
    return slopes(torch.tensor([math.log(ratio)]), torch.tensor([0.0]), advantage=advantage)[0]


def slopes(change: Tensor, value: Tensor, *, advantage: float = 0.0, wanted: float = 0.0) -> tuple[float, float]:
    """Gradients of one token's log-probability and value, whose old ones are 0."""
    one = torch.ones(1)
    extra = {"mix": 0 * one, "old_log_probs": 0 * one, "old_values": 0 * one}
    batch = Batch(
        tokens=torch.tensor([1, 2]),
        positions=torch.tensor([0, 1]),
        layout=pack_groups([[Example(tokens=np.arange(2), weights=np.ones(2), id="r")]], budget_tokens=9)[0].layout,
        index=torch.tensor([0]),
        targets=torch.tensor([2]),
        weights=one,
        owner=torch.tensor([0]),
        ids=("r",),
        extra={**extra, "advantages": one * advantage, "returns": one * wanted},
    )
    change.requires_grad_(), value.requires_grad_()
    PpoLoss(value_weight=1.0)(Scores(parts={"log_probs": change, "values": value}), batch).sum.backward()
    assert change.grad is not None
    assert value.grad is not None
    return float(change.grad), float(value.grad)


def test_the_policy_is_not_pushed_further_than_the_clip() -> None:
    assert gradient_at(1.3, advantage=2.0) == 0
    assert gradient_at(0.7, advantage=-2.0) == 0
    assert gradient_at(1.1, advantage=2.0) == pytest.approx(-2.2)
    assert gradient_at(0.9, advantage=-2.0) == pytest.approx(1.8)
    assert gradient_at(0.7, advantage=2.0) == pytest.approx(-1.4)  # back towards where it was is always allowed
    assert gradient_at(1.3, advantage=-2.0) == pytest.approx(2.6)


def test_the_value_is_not_pulled_further_than_the_clip() -> None:
    def pull(value: float, wanted: float) -> float:
        return slopes(torch.zeros(1), torch.tensor([value]), wanted=wanted)[1]

    assert pull(0.5, wanted=1.0) == 0
    assert pull(0.1, wanted=1.0) == pytest.approx(-0.9)
    assert pull(0.5, wanted=0.0) == pytest.approx(0.5)
    assert pull(-0.5, wanted=-1.0) == 0
