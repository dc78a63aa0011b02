"""What a dry run found is found again for the same job on the same machine, and for no other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.errors import TrainingError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.recipe import Update, parse_recipe
from tunesmith.train import dry_run
from tunesmith.train.plan import Prediction, derive, predict
from tunesmith.types import Example
from tunesmith.world import World

RECIPE = parse_recipe({"data": {"train": "-"}, "train": {"batch": 16}})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, worth using however fast the machine is."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(dry_run, "WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path / "dry_runs"


def prediction(model: Model, examples: Sequence[Example], update: Update = "full", budget: int = 512) -> Prediction:
    source = SftSteps(examples, batch=16, epochs=1.0, budget_tokens=budget, world=World())
    settings = derive(RECIPE, update, model, examples)
    return predict(model, source, CrossEntropy(), settings)


def test_the_same_job_is_timed_once(fresh_model: Model, tiny_examples: list[Example], cache: Path) -> None:
    first, second = (prediction(fresh_model, tiny_examples) for _ in range(2))
    assert (first.remembered, second.remembered) == (False, True)
    assert second.seconds == first.seconds
    assert second.peak_memory_bytes == pytest.approx(first.peak_memory_bytes, rel=0.1)  # what rests is measured anew
    assert len(list(cache.iterdir())) == 1


def test_other_rows_another_micro_batch_precision_and_update_are_timed_anew(
    fresh_model: Model, tiny_examples: list[Example]
) -> None:
    source = SftSteps(tiny_examples, batch=16, epochs=1.0, budget_tokens=512, world=World())
    rounded = replace(derive(RECIPE, "full", fresh_model, tiny_examples), precision="bfloat16")
    prediction(fresh_model, tiny_examples)
    assert not predict(fresh_model, source, CrossEntropy(), rounded).remembered
    assert not prediction(fresh_model, tiny_examples[1:]).remembered
    assert not prediction(fresh_model, tiny_examples, budget=256).remembered
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    assert not prediction(fresh_model, tiny_examples, "lora").remembered


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": 3}', '{"step_seconds": 1'])
def test_a_damaged_entry_is_replaced(
    content: str, fresh_model: Model, tiny_examples: list[Example], cache: Path
) -> None:
    prediction(fresh_model, tiny_examples)
    (entry,) = cache.iterdir()
    entry.write_text(content, encoding="utf-8")
    assert not prediction(fresh_model, tiny_examples).remembered
    assert prediction(fresh_model, tiny_examples).remembered


def test_what_fitted_before_is_refused_where_memory_is_short_now(
    fresh_model: Model, tiny_examples: list[Example], cache: Path
) -> None:
    prediction(fresh_model, tiny_examples)
    (entry,) = cache.iterdir()
    entry.write_text('{"step_seconds": 1.0, "peak_bytes": 1e14}', encoding="utf-8")
    with pytest.raises(TrainingError, match="training needs about"):
        prediction(fresh_model, tiny_examples)


def test_what_was_timed_long_ago_is_timed_anew(fresh_model: Model, tiny_examples: list[Example], cache: Path) -> None:
    prediction(fresh_model, tiny_examples)
    (entry,) = cache.iterdir()
    week_ago = entry.stat().st_mtime - dry_run.KEPT_SECONDS
    os.utime(entry, (week_ago, week_ago))
    assert not prediction(fresh_model, tiny_examples).remembered
    assert prediction(fresh_model, tiny_examples).remembered


def test_a_cache_that_cannot_be_written_stops_nothing(
    fresh_model: Model, tiny_examples: list[Example], cache: Path
) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    assert not prediction(fresh_model, tiny_examples).remembered


def test_what_was_timed_beside_other_programs_says_so_and_is_not_kept(
    fresh_model: Model, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0 * (os.cpu_count() or 1), 0.0, 0.0))
    found = prediction(fresh_model, tiny_examples)
    assert found.crowded
    assert "other programs" in found.source
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert not prediction(fresh_model, tiny_examples).remembered
