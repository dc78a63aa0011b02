"""GRPO and RLOO against plain loops: advantages within a group, the clipped loss, and a penalty never below 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import pack_groups
from tunesmith.methods.grpo import GrpoLoss, group_advantages, grpo_examples
from tunesmith.tensors import Batch, Scores
from tunesmith.types import Example

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]
SCORES = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=2, max_size=9)


@given(SCORES)
def test_grpo_advantages_are_standard_scores_of_the_group(scores: list[float]) -> None:
    found = group_advantages(np.array(scores), "grpo")
    if len(set(scores)) == 1:
        assert not found.any()
        return
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    assert found.tolist() == pytest.approx([(score - mean) / deviation for score in scores], abs=1e-9)


@given(SCORES)
def test_rloo_advantages_are_measured_from_the_others_mean(scores: list[float]) -> None:
    wanted = [
        score - sum(other for m, other in enumerate(scores) if m != n) / (len(scores) - 1)
        for n, score in enumerate(scores)
    ]
    assert group_advantages(np.array(scores), "rloo").tolist() == pytest.approx(wanted, abs=1e-9)


def test_rounding_of_the_scores_is_no_difference() -> None:
    for how in ("grpo", "rloo"):
        assert not group_advantages(np.array([3.2, 3.2 + 1e-7, 3.2 - 1e-7]), how).any()
        assert not group_advantages(np.array([1.0]), how).any()


def test_groups_that_say_nothing_are_left_out_and_counted(answers: Makes) -> None:
    groups = [tuple(pair) for pair in answers(4)]
    ready, alike = grpo_examples(groups, [1.0, 0.0, 0.5, 0.5, -1.0, 2.0, 0.0, 0.0], "rloo")
    assert alike == 2
    assert [[e.id for e in group] for group in ready] == [["0+", "0-"], ["2+", "2-"]]
    for group, wanted in zip(ready, [(1.0, -1.0), (-3.0, 3.0)], strict=True):
        for example, advantage in zip(group, wanted, strict=True):
            assert example.extra["advantages"].tolist() == (np.float32(advantage) * example.weights).tolist()


def test_where_no_group_says_anything_the_step_pushes_nowhere(answers: Makes) -> None:
    groups = [tuple(pair) for pair in answers(3)]
    ready, alike = grpo_examples(groups, [0.5] * 6, "grpo")
    assert alike == 3
    assert [[e.id for e in group] for group in ready] == [[e.id for e in group] for group in groups]
    assert not any(e.extra["advantages"].any() for group in ready for e in group)


def scored(answers: Makes, seed: int) -> Batch:
    draw = np.random.default_rng(seed)

    def filled(example: Example) -> Example:
        names = ("old_log_probs", "reference")
        numbers = {name: (draw.normal(size=len(example.tokens)) * 0.5 - 2) * example.weights for name in names}
        return replace(example, extra={name: values.astype(np.float32) for name, values in numbers.items()})

    groups = [tuple(map(filled, pair)) for pair in answers(4, seed)]
    ready, _ = grpo_examples(groups, draw.normal(size=8).tolist(), "grpo")
    (batch,) = pack_groups(ready, budget_tokens=10_000)
    return batch


@settings(max_examples=30)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.04, 1.0]))
def test_the_loss_is_that_of_a_loop_over_tokens(answers: Makes, seed: int, kl: float) -> None:
    batch = scored(answers, seed)
    log_probs = batch.extra["old_log_probs"] + torch.randn(len(batch.targets)) * 0.3
    terms = GrpoLoss(kl=kl)(Scores(parts={"log_probs": log_probs}), batch)
    wanted, clipped = 0.0, 0
    numbers = {name: part.double().tolist() for name, part in batch.extra.items()}
    for s, log_prob in enumerate(log_probs.double().tolist()):
        ratio = math.exp(log_prob - numbers["old_log_probs"][s])
        advantage = numbers["advantages"][s]
        q = math.exp(numbers["reference"][s] - log_prob)
        penalty = q - math.log(q) - 1
        assert penalty >= 0
        wanted += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)) + kl * penalty
        clipped += abs(ratio - 1) > 0.2
    assert float(terms.sum) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert terms.report["clipped"] == clipped
    assert GrpoLoss().count(batch) == len(batch.targets) == len(log_probs)


@given(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=20))
def test_the_penalty_is_never_negative_and_zero_only_at_the_reference(differences: list[float]) -> None:
    """The loss of tokens without advantage is the penalty alone."""
    size = len(differences) + 1
    row = Example(
        tokens=np.arange(size),
        weights=np.ones(size, dtype=np.float32),
        id="r",
        extra={name: np.zeros(size, dtype=np.float32) for name in ("old_log_probs", "reference", "advantages")},
    )
    (batch,) = pack_groups([[row]], budget_tokens=99)
    log_probs = torch.tensor(differences, requires_grad=True)
    total = GrpoLoss(kl=1.0)(Scores(parts={"log_probs": log_probs}), batch).sum
    assert float(total.detach()) >= 0
    assert (float(total.detach()) > 1e-6) == any(abs(one) > 2e-3 for one in differences) or abs(float(total)) < 1e-4
    total.backward()
    assert log_probs.grad is not None
    for slope, one in zip(log_probs.grad.tolist(), differences, strict=True):
        assert slope * one >= 0  # always back to the reference


def test_no_reference_is_needed_without_a_penalty(answers: Makes) -> None:
    batch = scored(answers, 1)
    bare = replace(batch, extra={name: part for name, part in batch.extra.items() if name != "reference"})
    at = Scores(parts={"log_probs": batch.extra["old_log_probs"]})
    assert float(GrpoLoss()(at, bare).sum) == float(GrpoLoss()(at, batch).sum)
