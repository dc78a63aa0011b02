"""From measurements to a decision, on numbers made up so that the right answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tunesmith.evaluate.forgetting import Forgetting, General
from tunesmith.pipeline.results import Findings, conclude
from tunesmith.recipe import Recipe, parse_recipe
from tunesmith.types import Measurement

Make = Callable[..., dict[str, Any]]
TRAIN = {"seconds": 1.0, "flops": 1e9, "peak_memory_bytes": 1e8, "predicted": {"seconds": 2.0}}


def measurement(arm: str, prompt_tokens: int = 10, **scores: list[float]) -> Measurement:
    rows = len(next(iter(scores.values()), [0.0] * 100))
    return Measurement(
        arm=arm,
        ids=tuple(f"row{n}" for n in range(rows)),
        answers=("",) * rows,
        scores={name: np.array(values) for name, values in scores.items()},
        prompt_tokens=np.full(rows, prompt_tokens),
        completion_tokens=np.full(rows, 3),
        seconds=1.0,
    )


def findings(*measured: Measurement, best: str, **rest: Any) -> Findings:
    arms = {one.arm: one for one in measured}
    trained = {name: TRAIN for name in ("lora", "full") if name in arms}
    size = {"product_parameters": 1000, "head_parameters": 0}
    known: dict[str, Any] = {"forgetting": {}, "shots": 2, "subject": "lora", "facts": {}, **size}
    return Findings(measurements=arms, trained=trained, best_prompted=best, **{**known, **rest})


@pytest.fixture
def recipe(tiny_recipe: Make) -> Callable[..., Recipe]:
    def make(changes: Mapping[str, object]) -> Recipe:
        return parse_recipe(tiny_recipe(changes))

    return make


def test_prompts_that_could_not_compete_are_told_with_the_verdict(recipe: Callable[..., Recipe]) -> None:
    arms = [measurement("base", exact_match=[0.0] * 100), measurement("lora", exact_match=[1.0] * 100)]
    untried = "few_shot: 5 shots left out, as 1 of 100 held-out rows would be longer"
    results = conclude(recipe({}), findings(*arms, best="base", facts={"untried": [untried]}))
    assert results["verdict"]["decision"] == "ship"
    assert f"Not compared: {untried}." in results["verdict"]["reasons"]
    assert results["untried"] == [untried]


@pytest.mark.parametrize("same", [True, False])
def test_training_is_repaid_by_a_teachers_tokens_only_where_it_is_the_same_model(
    recipe: Callable[..., Recipe], same: bool
) -> None:
    teacher = {"by": recipe({}).base if same else "http://localhost:1/v1", "model": "big"}
    scores = [1.0] * 100
    arms = [measurement("base", exact_match=[0.0] * 100), measurement("teacher", 510, exact_match=scores)]
    found = findings(*arms, measurement("lora", exact_match=scores), best="teacher", facts={"distill": {}})
    saved = conclude(recipe({"task.teacher": teacher}), found)["savings"]
    assert saved["tokens_saved_per_request"] == 500
    assert saved["break_even_requests"] == (1000 if same else None)
    assert saved["flops_saved_per_request"] == (1e6 if same else None)


def test_a_clear_gain_ships_and_what_it_saves_is_told(recipe: Callable[..., Recipe]) -> None:
    found = findings(
        measurement("base", exact_match=[0.0] * 100),
        measurement("few_shot", 90, exact_match=[1.0] * 30 + [0.0] * 70),
        measurement("lora", 10, exact_match=[1.0] * 90 + [0.0] * 10),
        best="few_shot",
    )
    results = conclude(recipe({}), found)
    assert results["verdict"]["decision"] == "ship"
    assert results["savings"]["prompt_tokens_saved_per_request"] == 80
    assert results["plan"]["lora"]["predicted"] == {"seconds": 2.0}
    assert "predicted" not in results["arms"]["lora"]["train"]
    json.dumps(results)


def test_a_lower_loss_is_the_better_one(recipe: Callable[..., Recipe]) -> None:
    spread = [0.01 * (n % 7) for n in range(100)]
    found = findings(
        measurement("base", completion_loss=[2.0 + s for s in spread]),
        measurement("lora", completion_loss=[1.0 + 2 * s for s in spread]),
        measurement("full", completion_loss=[1.5 + 3 * s for s in spread]),
        best="base",
    )
    results = conclude(recipe({"task.metric": "completion_loss"}), found)
    assert results["verdict"]["decision"] == "ship"
    assert results["lora_versus_full"]["quality_fraction"]["value"] > 1


def test_an_arm_without_the_deciding_metric_is_listed_and_not_compared_on_it(recipe: Callable[..., Recipe]) -> None:
    loss, right = [1.0 + 0.1 * (n % 3) for n in range(100)], [float(n % 2) for n in range(100)]
    found = findings(
        measurement("base", completion_loss=loss, exact_match=right),
        measurement("majority", exact_match=right),
        measurement("nearest_neighbour"),
        measurement("lora", completion_loss=loss, exact_match=right),
        best="base",
    )
    results = conclude(recipe({"task.metric": "completion_loss"}), found)
    pairs = {(row["b"], row["metric"]) for row in results["contrasts"]}
    assert pairs == {("base", "completion_loss"), ("base", "exact_match"), ("majority", "exact_match")}
    assert results["arms"]["nearest_neighbour"]["metrics"] == {}


@pytest.mark.parametrize("rows", [1, 2])
def test_very_few_rows_carry_no_verdict(recipe: Callable[..., Recipe], rows: int) -> None:
    found = findings(
        measurement("base", exact_match=[0.0] * rows), measurement("lora", exact_match=[1.0] * rows), best="base"
    )
    assert conclude(recipe({}), found)["verdict"]["decision"] == "not shown"


def test_forgetting_over_the_limit_is_a_reason_not_to_ship(recipe: Callable[..., Recipe]) -> None:
    before = General(losses=np.linspace(1, 2, 48), correct=np.ones(12))
    after = General(losses=np.linspace(2, 3, 48), correct=np.zeros(12))
    found = findings(
        measurement("base", exact_match=[0.0] * 100),
        measurement("lora", exact_match=[1.0] * 100),
        best="base",
        forgetting={"lora": Forgetting(before=before, after=after, kl=np.linspace(0.1, 0.2, 16))},
    )
    results = conclude(recipe({}), found)
    assert results["verdict"]["decision"] == "do not ship"
    lost = results["forgetting"]["lora"]
    assert lost["general_loss"]["change"]["value"] == pytest.approx(1)
    assert lost["general_accuracy"]["change"]["value"] == -1
    assert lost["general_accuracy"]["change"]["high"] > -1
    assert lost["kl_from_base"]["after"]["n"] == 16


def test_general_accuracy_that_did_not_change_may_have_changed_either_way(recipe: Callable[..., Recipe]) -> None:
    same = General(losses=np.linspace(1, 2, 48), correct=np.ones(20))
    found = findings(
        measurement("base", exact_match=[0.0] * 100),
        measurement("lora", exact_match=[1.0] * 100),
        best="base",
        forgetting={"lora": Forgetting(before=same, after=same, kl=np.linspace(0.1, 0.2, 16))},
    )
    change = conclude(recipe({}), found)["forgetting"]["lora"]["general_accuracy"]["change"]
    assert change["low"] < -0.1 < change["value"] == 0.0 < 0.1 < change["high"]


def test_a_lookup_that_is_better_speaks_against_the_tuned_model(recipe: Callable[..., Recipe]) -> None:
    found = findings(
        measurement("base", exact_match=[0.0] * 100),
        measurement("lora", exact_match=[1.0] * 60 + [0.0] * 40),
        measurement("majority", exact_match=[1.0] * 85 + [0.0] * 15),
        best="base",
    )
    verdict = conclude(recipe({}), found)["verdict"]
    assert verdict["decision"] == "do not ship"
    assert any("majority is shown to be better" in reason for reason in verdict["reasons"])
