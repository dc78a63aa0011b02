"""`tunesmith round` writes a base in 8 bits and what that cost it, or leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import FolderError, ModelError
from tunesmith.folder import manifest_problem, read_json
from tunesmith.model.eight_bits import RECORD
from tunesmith.model.load import load
from tunesmith.pipeline.export import Wanted, export
from tunesmith.pipeline.rounding import round_base
from tunesmith.pipeline.run import run as start
from tunesmith.recipe import parse_recipe
from tunesmith.screen import Screen
from tunesmith.world import World

QUIET = Screen(quiet=True)


@pytest.fixture(scope="module")
def rounded(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounding") / "rounded"
    round_base(str(tiny_model_folder), out, QUIET)
    return out


def test_what_rounding_cost_is_written_beside_it(rounded: Path, tiny_model_folder: Path) -> None:
    record = read_json(rounded / RECORD)
    loss = record["general_loss"]
    assert record["base"] == str(tiny_model_folder)
    assert loss["change"]["value"] == pytest.approx(loss["after"]["value"] - loss["before"]["value"])
    assert loss["change"]["low"] <= loss["change"]["value"] <= loss["change"]["high"]
    assert loss["before"]["value"] != loss["after"]["value"]
    assert abs(loss["change"]["value"]) < 0.05
    assert not manifest_problem(rounded)


def test_whoever_loads_it_is_told_that_it_is_approximate(rounded: Path, tiny_model_folder: Path) -> None:
    for weights in ("float32", "stored"):
        assert any("approximate" in note for note in load(str(rounded), World(), weights).notes)
    assert not any("approximate" in note for note in load(str(tiny_model_folder), World()).notes)


def test_a_folder_that_is_there_is_left_alone(rounded: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(FolderError, match="exists already"):
        round_base(str(tiny_model_folder), rounded, QUIET)
    assert not manifest_problem(rounded)


def test_what_a_killed_command_left_is_deleted_by_the_next(tiny_model_folder: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.1234-abcd.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half of it")
    round_base(str(tiny_model_folder), tmp_path / "out", QUIET)
    assert not left.exists()


def test_a_rounded_base_is_not_rounded_again(rounded: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rounded already"):
        round_base(str(rounded), tmp_path / "again", QUIET)
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        round_base(str(tmp_path / "nothing"), tmp_path / "out", QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_over_a_rounded_base_is_judged_exported_and_chained_as_any(
    rounded: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {"base": str(rounded), "out": str(tmp_path / "run"), "lora.weights": "stored"}
    folder = start(parse_recipe(tiny_recipe(changes)), screen=QUIET)
    assert {"base", "lora"} <= set(read_json(folder.results)["arms"])
    assert any("8 bits" in str(one) for one in read_json(folder.plan)["derived"])
    assert "the base is approximate" in folder.report.read_text(encoding="utf-8")
    for to in ("adapter", "merged"):
        assert export(folder.path, Wanted(to=to, rows=4), QUIET)["passed"]
    assert not (folder.path / "exports" / "merged" / RECORD).exists()  # it is no rounded base
    assert load(str(folder.path), World(), "stored").weights.value == "float32"  # the sum is no multiple of the steps
