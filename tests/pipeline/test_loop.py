"""Looks at held-out rows: several ranks stop as one, and what lies beyond a limit is not the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.folder import RunFolder, read_jsonl
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model
from tunesmith.pipeline.loop import Undertaking, best_weights, carry_out
from tunesmith.screen import Screen
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World


def work(model: Model, examples: list[Example], world: World) -> Undertaking:
    """Looks that grow worse on the first rank and better on the others, as those of a judge that is never the same."""
    sign = 1.0 if world.leads else -1.0
    return Undertaking(
        name="full",
        model=model,
        source=SftSteps(examples, batch=4, epochs=1.0, budget_tokens=512, world=world, max_steps=4),
        loss=CrossEntropy(),
        how=Optimization(learning_rate=1e-3),
        watch=lambda step: {"cost": sign * step},
        decides="cost",
        describe=str,
        evaluations=4,
        patience=2,
    )


def test_all_ranks_stop_where_the_first_sees_no_improvement(
    fresh_model: Model,
    tiny_examples: list[Example],
    tmp_path: Path,
    two_ranks: Callable[[Callable[[World], object]], None],
) -> None:
    def rank(world: World) -> None:
        outcome = carry_out(
            work(fresh_model, tiny_examples, world), RunFolder(path=tmp_path), world, Screen(quiet=True)
        )
        assert outcome.done.step == 3
        assert outcome.best == {"step": 1.0, "cost": 1.0}

    two_ranks(rank)
    assert [line["cost"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "cost" in line] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("beyond", "best"),
    [([0.0, 0.0, 5.0, 1.0], 2), ([0.0, 0.0, 0.0, 0.0], 4), ([3.0, 2.0, 2.0, 4.0], 3), ([1.0, 0.0, 1.0, 1.0], 2)],
    ids=["far looks gain most", "none is far", "all are far", "one is near"],
)
def test_a_look_beyond_a_limit_is_the_best_only_where_none_lies_nearer(
    fresh_model: Model, tiny_examples: list[Example], tmp_path: Path, beyond: list[float], best: int
) -> None:
    weights = fresh_model.hf.state_dict()
    seen = []

    def watch(step: int) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in weights.items()})
        return {"cost": -float(step), "beyond_limit": beyond[step - 1]}

    folder = RunFolder(path=tmp_path)
    undertaking = replace(work(fresh_model, tiny_examples, World()), watch=watch, patience=4)
    outcome = carry_out(undertaking, folder, World(), Screen(quiet=True))
    assert outcome.best["step"] == best
    kept = load_file(best_weights(folder, "full"))
    assert all(torch.equal(value, seen[best - 1][name]) for name, value in kept.items())
