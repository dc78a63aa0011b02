"""DPO and IPO against their formulas in float64, one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import pack_groups
from tunesmith.methods.annotate import annotate
from tunesmith.methods.dpo import PreferenceLoss
from tunesmith.methods.order import EpochSteps
from tunesmith.methods.pairs import pair_count, per_answer
from tunesmith.model.load import Model
from tunesmith.model.score import score
from tunesmith.tensors import Batch, Scores
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]
LOSSES = [
    PreferenceLoss(),
    PreferenceLoss(beta=0.5),
    PreferenceLoss(beta=0.5, smoothing=0.2),
    PreferenceLoss(beta=0.2, kind="ipo"),
]


def referred(pairs: Pairs, seed: int) -> list[tuple[Example, ...]]:
    """The pairs with made-up log-probabilities of a reference."""
    draw = np.random.default_rng(seed)
    numbers = [[-draw.exponential(2, len(e.tokens)).astype(np.float32) * e.weights for e in pair] for pair in pairs]
    return [
        tuple(replace(e, extra={"reference": n}) for e, n in zip(pair, them, strict=True))
        for pair, them in zip(pairs, numbers, strict=True)
    ]


def one_pair(loss: PreferenceLoss, h: float) -> float:
    """The formula in the docstring, by hand."""
    if loss.kind == "ipo":
        return (h - 1 / (2 * loss.beta)) ** 2
    odds = 1 / (1 + math.exp(-loss.beta * h))
    return -(1 - loss.smoothing) * math.log(odds) - loss.smoothing * math.log(1 - odds)


@settings(max_examples=30)
@given(st.sampled_from(LOSSES), st.integers(1, 6), st.integers(0, 99))
def test_the_loss_is_its_formula_as_a_sum(answers: Makes, loss: PreferenceLoss, count: int, seed: int) -> None:
    groups = referred(answers(count, seed), seed)
    (batch,) = pack_groups(groups, budget_tokens=10_000)
    log_probs = -torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(seed)) * 3
    terms = loss(Scores(parts={"log_probs": log_probs}), batch)
    sides: dict[str, float] = {}
    for log_prob, reference, owner in zip(
        log_probs.double().tolist(), batch.extra["reference"].double().tolist(), batch.owner.tolist(), strict=True
    ):
        sides[batch.ids[owner]] = sides.get(batch.ids[owner], 0.0) + log_prob - reference
    names = [batch.ids[2 * n][:-1] for n in range(count)]
    h = [sides[f"{name}+"] - sides[f"{name}-"] for name in names]
    assert float(terms.sum) == pytest.approx(sum(one_pair(loss, one) for one in h), rel=1e-4, abs=1e-4)
    assert terms.report["accuracy"] == sum(one > 0 for one in h)
    chosen = loss.beta * sum(sides[f"{name}+"] for name in names)
    rejected = loss.beta * sum(sides[f"{name}-"] for name in names)
    assert terms.report["chosen_reward"] == pytest.approx(chosen, rel=1e-4, abs=1e-4)
    assert terms.report["rejected_reward"] == pytest.approx(rejected, rel=1e-4, abs=1e-4)
    assert loss.count(batch) == pair_count(batch) == count


def test_sums_of_answers_stand_chosen_first(answers: Makes) -> None:
    (batch,) = pack_groups(answers(3), budget_tokens=10_000)
    sums = per_answer(torch.ones(len(batch.targets)), batch)
    lengths = {e.id: float((e.weights > 0).sum()) for pair in answers(3) for e in pair}
    assert sums.flatten().tolist() == [lengths[name] for name in batch.ids]


def gradients_of(model: Model, loss: PreferenceLoss, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    total = sum((loss(score(model, batch), batch).sum for batch in batches), torch.zeros(()))
    total.backward()
    found = {name: p.grad.clone() for name, p in trainable(model.hf).items() if p.grad is not None}
    model.hf.zero_grad()
    return float(total.detach()), found


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_sharing_the_prompt_changes_neither_loss_nor_gradient(
    loss: PreferenceLoss, answers: Makes, fresh_model: Model
) -> None:
    groups = referred(answers(4), 0)
    shared = gradients_of(fresh_model, loss, pack_groups(groups, budget_tokens=10_000))
    apart = gradients_of(fresh_model, loss, pack_groups(groups, budget_tokens=1, share=False))
    assert shared[0] == pytest.approx(apart[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in apart[1].values())
    for name, gradient in apart[1].items():
        torch.testing.assert_close(shared[1][name], gradient, rtol=1e-4, atol=2e-6 * largest)


def test_the_policy_starts_as_its_reference_at_log_two_and_learns_to_prefer(
    answers: Makes, fresh_model: Model, tmp_path: Path
) -> None:
    groups = annotate(fresh_model, answers(8), {"log_probs": "reference"}, budget_tokens=999)
    source = EpochSteps(groups, batch=8, epochs=10.0, budget_tokens=300, world=World())
    how = Optimization(learning_rate=5e-3, warmup=0.0)
    done = list(fit(fresh_model, source, PreferenceLoss(beta=0.5), how, tmp_path, World()))
    assert done[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert done[0].report["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert done[-1].loss < 0.3
    assert done[-1].report["accuracy"] == 1.0
    assert done[-1].report["chosen_reward"] > done[-1].report["rejected_reward"] + 1
