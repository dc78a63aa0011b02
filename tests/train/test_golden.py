"""Loss curves of the tiny model, as they were: a change that is no more than tidying keeps them.

Where a change is meant to move them, delete the file in tests/golden, run this test twice, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.linear import AMX, Precision
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World

GOLDEN = Path(__file__).parents[1] / "golden"


def curve(update: str, model: Model, examples: list[Example], folder: Path, precision: Precision) -> list[float]:
    if update == "lora":
        attach_lora(model.hf, LoraShape(rank=8, alpha=32.0), head=model.head)
    source = SftSteps(examples, batch=16, epochs=3.0, budget_tokens=400, world=World(), max_steps=20)
    how = Optimization(learning_rate=5e-3, schedule="cosine", weight_decay=0.01, precision=precision)
    return [done.loss for done in fit(model, source, CrossEntropy(), how, folder, World())]


@pytest.mark.parametrize("update", ["lora", "full"])
def test_the_loss_curve_is_the_one_in_the_tree(
    update: str, fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    found = curve(update, fresh_model, tiny_examples, tmp_path, "float32")
    path = GOLDEN / f"sft_{update}.json"
    if not path.is_file():
        path.write_text(json.dumps({"loss": found}, indent=1) + "\n")
        pytest.fail(f"wrote {path.name}; look at it and run again")
    assert found == pytest.approx(json.loads(path.read_text())["loss"], abs=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("update", ["lora", "full"])
def test_with_products_of_bfloat16_the_loss_curve_stays_within_a_hundredth(
    update: str, fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    found = curve(update, fresh_model, tiny_examples, tmp_path, "bfloat16")
    exact = json.loads((GOLDEN / f"sft_{update}.json").read_text())["loss"]
    assert found == pytest.approx(exact, abs=1e-2)
    assert (found == pytest.approx(exact, abs=1e-4)) is not AMX
