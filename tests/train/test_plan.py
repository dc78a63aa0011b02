"""Every derived value has a reason, the recipe's own values win, and what does not fit is refused with what would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.errors import TrainingError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.linear import AMX
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.recipe import Recipe, parse_recipe
from tunesmith.train import plan
from tunesmith.train.meter import available_bytes, machine, memory_bytes, peak_memory_bytes, reset_peak_memory
from tunesmith.train.plan import Prediction, Reach, derive, flops, predict
from tunesmith.types import Example
from tunesmith.world import World

CPU = torch.device("cpu")


def recipe(**more: object) -> Recipe:
    return parse_recipe({"data": {"train": "rows.jsonl"}, **more})


def source(examples: Sequence[Example], budget: int = 512) -> SftSteps:
    return SftSteps(examples, batch=16, epochs=1.0, budget_tokens=budget, world=World())


def prediction(model: Model, examples: Sequence[Example], budget: int = 512) -> Prediction:
    settings = derive(recipe(train={"batch": 16}), "full", model, examples)
    return predict(model, source(examples, budget), CrossEntropy(), settings)


@pytest.mark.parametrize("update", ["lora", "full", "economy"])
def test_every_derived_value_has_a_reason(update: str, tiny_model: Model, tiny_examples: list[Example]) -> None:
    settings = derive(recipe(), update, tiny_model, tiny_examples)  # type: ignore[arg-type]
    own = {"lora": ["lora.rank"], "full": [], "economy": ["lora.lowest", "lora.rank"]}[update]
    keys = ["train.epochs", "train.batch", f"{update}.learning_rate", *own, "train.microbatch_tokens"]
    keys += ["lora.precision"] if AMX and update != "full" else []
    assert [one.key for one in settings.derived] == keys
    assert all(len(one.reason) > 20 for one in settings.derived)
    assert [one.value for one in settings.derived if one.key == "train.batch"] == [settings.batch]


@pytest.mark.parametrize("fast", [False, True])
def test_products_are_rounded_only_where_asked_for_and_faster_and_the_plan_says_which(
    fast: bool, tiny_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "AMX", fast)
    asked = {"precision": "bfloat16"}
    for method, update, lora in (
        ("sft", "lora", {}),
        ("sft", "lora", asked),
        ("reward", "lora", asked),
        ("sft", "economy", asked),
        ("sft", "full", asked),
        ("dpo", "lora", asked),
    ):
        settings = derive(recipe(method=method, lora=lora), update, tiny_model, tiny_examples)  # type: ignore[arg-type]
        may = update != "full" and method != "dpo"
        assert settings.precision == ("bfloat16" if may and lora and fast else "float32")
        told = [one for one in settings.derived if one.key == "lora.precision"]
        assert [one.value for one in told] == ([settings.precision] if may and (fast or lora) else [])


def test_what_the_recipe_gives_wins_and_says_so(
    tiny_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "AMX", False)  # with it the plan tells what could be faster
    given = recipe(
        train={"epochs": 7, "batch": 3, "learning_rate": 0.1, "microbatch_tokens": 99},
        lora={"rank": 5, "learning_rate": 0.2},
    )
    lora, full = (derive(given, update, tiny_model, tiny_examples) for update in ("lora", "full"))
    assert (lora.epochs, lora.batch, lora.learning_rate, lora.rank, lora.microbatch_tokens) == (7, 3, 0.2, 5, 99)
    assert (full.learning_rate, full.rank) == (0.1, 0)
    assert {one.reason for one in (*lora.derived, *full.derived)} == {"from the recipe"}


def test_rules_follow_the_size_of_the_data_and_the_model(tiny_model: Model, tiny_examples: list[Example]) -> None:
    few, many = (derive(recipe(), "lora", tiny_model, tiny_examples * n) for n in (1, 100))
    assert (few.epochs, many.epochs) == (3.0, 1.0)
    assert (few.batch, many.batch) == (4, 32)
    assert few.rank == 16
    assert few.learning_rate == pytest.approx(5e-4 * (2000 / 64) ** 0.78, rel=0.05)
    full = derive(recipe(), "full", tiny_model, tiny_examples)
    assert full.learning_rate == pytest.approx(few.learning_rate / 10, rel=0.05)
    economy = derive(recipe(), "economy", tiny_model, tiny_examples)
    assert economy.learning_rate == pytest.approx(few.learning_rate * 2, rel=0.05)


def test_a_row_longer_than_the_usual_micro_batch_still_fits(tiny_model: Model) -> None:
    long = Example(tokens=np.full(5000, 7), weights=np.ones(5000, dtype=np.float32), id="long")
    assert derive(recipe(), "full", tiny_model, [long]).microbatch_tokens == 5000


def test_blocks_are_computed_again_where_a_micro_batch_has_no_room(
    tiny_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not derive(recipe(), "lora", tiny_model, tiny_examples).recompute
    need = plan.HEAP_SLACK * plan._step_bytes(tiny_model, 2048, False)
    monkeypatch.setattr(plan, "available_bytes", lambda device: (memory_bytes(CPU) + need / 2) / plan.RESERVED)
    settings = derive(recipe(), "lora", tiny_model, tiny_examples)
    assert settings.recompute
    assert settings.derived[-1].key == "recompute"
    assert re.search(r"2,048 tokens would take \d\.\d GB", settings.derived[-1].reason)


def test_processes_on_one_machine_plan_with_their_share_of_its_memory(
    fresh_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (replace(fresh_model, sharing=ranks) for ranks in (1, 2))
    need = 2 * plan.HEAP_SLACK * plan._step_bytes(one, 2048, False)
    monkeypatch.setattr(plan, "available_bytes", lambda device: (memory_bytes(CPU) + need) / plan.RESERVED)
    assert [derive(recipe(), "lora", model, tiny_examples).recompute for model in (one, two)] == [False, True]
    with pytest.raises(TrainingError, match=r"(?s)each of 2 processes needs about .* Or start fewer\."):
        prediction(two, tiny_examples)


def test_the_prediction_changes_nothing(fresh_model: Model, tiny_model: Model, tiny_examples: list[Example]) -> None:
    found = prediction(fresh_model, tiny_examples)
    assert found.seconds > 0
    assert found.peak_memory_bytes > memory_bytes(CPU) / 2
    for (name, one), other in zip(fresh_model.hf.named_parameters(), tiny_model.hf.parameters(), strict=True):
        assert one.grad is None, name
        assert torch.equal(one, other)


def test_useful_flops_are_six_or_four_per_weight_and_token(fresh_model: Model) -> None:
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + fresh_model.head_weight.numel()
    assert fresh_model.product_parameters == weights
    assert flops(fresh_model, "full", [10, 30], 100) == 6 * weights * 20 * 100
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    assert flops(fresh_model, "lora", [10, 30], 100) == 4 * weights * 20 * 100


def test_the_head_costs_where_something_is_scored_also_when_a_reference_reads(fresh_model: Model) -> None:
    weights, head = fresh_model.product_parameters, fresh_model.head_weight.numel()
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    for scored in (0.0, 0.25):
        met = weights - head + scored * head
        found = flops(fresh_model, "lora", [10, 30], 100, Reach(scored=scored, forwards=0.5))
        assert found == (4 + 2 * 0.5) * met * 20 * 100


def test_fewer_rows_than_a_batch_asks_for_cost_no_more_than_they_are(
    fresh_model: Model, tiny_examples: list[Example]
) -> None:
    few = tiny_examples[:5]
    tokens = sum(len(example.tokens) for example in few)
    assert prediction(fresh_model, few).flops == pytest.approx(6 * fresh_model.product_parameters * tokens)


PREDICT = """
import sys
import numpy as np
from tunesmith.errors import TrainingError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import load
from tunesmith.recipe import parse_recipe
from tunesmith.train import plan
from tunesmith.types import Example
from tunesmith.world import World

folder, budget, room = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ones = np.ones(400, dtype=np.float32)
rows = [Example(tokens=np.arange(400) % 250 + n % 40, weights=ones, id=str(n)) for n in range(48)]
if room:
    plan.available_bytes = lambda device: int(room / plan.RESERVED)
model, source = load(folder, World()), SftSteps(rows, batch=16, epochs=1.0, budget_tokens=budget, world=World())
recipe = parse_recipe({"data": {"train": "-"}, "train": {"batch": 16, "microbatch_tokens": budget}})
try:
    settings = plan.derive(recipe, "full", model, rows)
    print(plan.predict(model, source, CrossEntropy(), settings).peak_memory_bytes)
except TrainingError as error:
    print(error)
"""


@pytest.mark.slow
def test_too_little_memory_is_refused_with_a_micro_batch_that_fits(tiny_model_folder: Path) -> None:
    """Each attempt has a fresh process: what others left in the heap would count as used."""

    def outcome(budget: int, room: float = 0.0) -> str:
        command = [sys.executable, "-c", PREDICT, str(tiny_model_folder), str(budget), str(room)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    small, large = float(outcome(400)), float(outcome(6400))
    assert large > small + 10e6
    room = (small + large) / 2
    found, budget = outcome(6400, room), 6400
    assert re.match(r"train.microbatch_tokens: training needs about \d\.\d GB, the machine has", found)
    while named := re.search(r"train.microbatch_tokens to (\d+)", found):  # what a process takes varies by some MB
        assert 400 <= int(named[1]) < budget
        budget = int(named[1])
        found = outcome(budget, room)
    assert float(found) < room


def test_where_no_micro_batch_fits_a_smaller_model_is_asked_for(
    fresh_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda device: 1_000_000)
    with pytest.raises(TrainingError, match="Choose update: lora") as caught:
        prediction(fresh_model, tiny_examples)
    assert "microbatch_tokens to" not in str(caught.value)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_starts_anew_after_a_reset() -> None:
    block = np.ones(30_000_000)
    high = peak_memory_bytes(CPU)
    size = block.nbytes
    del block
    reset_peak_memory()
    assert peak_memory_bytes(CPU) < high - size / 2
    assert peak_memory_bytes(CPU) >= memory_bytes(CPU) * 0.9


def test_the_machine_is_described_in_words_and_numbers() -> None:
    found = machine(CPU)
    assert found["device"] == found["cpu"]
    assert found["torch"] == torch.__version__
    assert found["memory_bytes"] == available_bytes(CPU)
    assert available_bytes(CPU) > memory_bytes(CPU)


def test_economy_adapts_the_share_of_the_blocks_that_the_recipe_names(
    tiny_model: Model, tiny_examples: list[Example]
) -> None:
    for upper, lowest in ((0.01, 1), (0.5, 1), (0.8, 0), (1.0, 0)):
        assert derive(recipe(lora={"upper": upper}), "economy", tiny_model, tiny_examples).lowest == lowest
