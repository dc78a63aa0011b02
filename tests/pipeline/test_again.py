"""A finished run used again: counted reads of the test rows, the right model, the right metric."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tunesmith import run
from tunesmith.errors import FolderError, ModelError, RecipeError
from tunesmith.folder import RunFolder, read_json, read_jsonl, write_json, write_jsonl
from tunesmith.model.load import resolve
from tunesmith.model.lora import lora_layers
from tunesmith.pipeline.again import chat_with, compare_runs, evaluate_again, open_model
from tunesmith.pipeline.export import Wanted, export
from tunesmith.recipe import dump_recipe, load_recipe, parse_recipe
from tunesmith.screen import Screen
from tunesmith.serve.hall import line_up
from tunesmith.world import World

Make = Callable[..., dict[str, Any]]
QUIET = Screen(quiet=True)


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run.with_name("run"), tmp_path / "copy")


def rows(path: Path, *pairs: tuple[str, str]) -> str:
    write_jsonl(path, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    return str(path)


def test_asking_test_rows_again_is_counted_and_other_rows_are_not(copy: Path, tmp_path: Path) -> None:
    line = read_jsonl(RunFolder(path=copy).answers("lora"))[0]
    asked = rows(tmp_path / "test.jsonl", (line["prompt"][-1]["content"], line["reference"]))
    other = rows(tmp_path / "other.jsonl", ("Upper case of: zzz", "ZZZ"))
    evaluate_again(copy, other, "lora", QUIET)
    assert read_json(copy / "results.json")["test_reads"] == 1
    found = evaluate_again(copy, asked, "lora", QUIET)
    assert found["rows"] == 1
    assert read_json(copy / "results.json")["test_reads"] == 2


def test_the_same_rows_get_the_same_scores_again(copy: Path, tmp_path: Path) -> None:
    folder = RunFolder(path=copy)
    for update in ("lora", "full", "base"):
        lines = read_jsonl(folder.answers(update))
        asked = rows(tmp_path / "test.jsonl", *((line["prompt"][-1]["content"], line["reference"]) for line in lines))
        found = evaluate_again(copy, asked, update, QUIET)
        before = read_json(copy / "results.json")["arms"][update]["metrics"]
        assert {name: one["value"] for name, one in found["metrics"].items()} == pytest.approx(
            {name: one["value"] for name, one in before.items()}
        )


def test_rows_that_ask_what_was_trained_on_are_counted_and_told(copy: Path, tmp_path: Path, tiny_rows: Path) -> None:
    seen = [(row["prompt"], row["completion"]) for row in read_jsonl(tiny_rows)[:3]]
    said = Console(file=io.StringIO(), width=500)
    evaluate_again(copy, rows(tmp_path / "a.jsonl", *seen, ("Upper case of: zzz", "ZZZ")), "lora", Screen(console=said))
    assert f"3 of 4 rows ask what rows of {tiny_rows} ask" in said.file.getvalue()  # type: ignore[attr-defined]
    said = Console(file=io.StringIO(), width=500)
    evaluate_again(copy, rows(tmp_path / "b.jsonl", ("Upper case of: zzz", "ZZZ")), "lora", Screen(console=said))
    assert "trained on" not in said.file.getvalue()  # type: ignore[attr-defined]


def test_near_duplicates_are_asked_and_preferences_refused(copy: Path, tmp_path: Path) -> None:
    pairs = [(f"Upper case of: {'very ' * 30}{word}", word.upper()) for word in ("abc", "abd")]
    assert evaluate_again(copy, rows(tmp_path / "new.jsonl", *pairs), "", QUIET)["rows"] == 2
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(RecipeError, match="preference pairs"):
        evaluate_again(copy, str(tmp_path / "pairs.jsonl"), "", QUIET)


def test_a_metric_of_the_users_own_is_found_again_from_anywhere(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "own.py").write_text("def f(answer, item):\n    return 0.25\n")
    changes = {"task.metric": "own.py:f", "task.shots": 0, "train.max_steps": 1, "out": str(tmp_path / "run")}
    run(parse_recipe(tiny_recipe(changes)), root=home)
    monkeypatch.chdir(tmp_path)
    found = evaluate_again(tmp_path / "run", rows(tmp_path / "new.jsonl", ("a", "b")), "", QUIET)
    assert found["metrics"]["own.py:f"]["value"] == 0.25


def test_each_update_opens_as_it_was_trained(finished_run: Path, tiny_model_folder: Path) -> None:
    name = str(finished_run.with_name("run"))
    assert lora_layers(open_model(name, World(), "lora").hf)
    assert not lora_layers(open_model(name, World(), "full").hf)
    assert not lora_layers(open_model(str(tiny_model_folder), World()).hf)


def test_an_update_that_was_not_trained_is_told(copy: Path) -> None:
    shutil.rmtree(copy / "adapter")
    with pytest.raises(FolderError, match="not what the run handed over: it is gone"):
        open_model(str(copy), World(), "lora")


def test_an_adapter_is_not_used_on_a_base_with_other_weights(copy: Path, tmp_path: Path) -> None:
    recipe = load_recipe(copy / "recipe.yaml")
    base = shutil.copytree(recipe.base, tmp_path / "base")
    (copy / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"base": str(base)})))
    asked = rows(tmp_path / "new.jsonl", ("a", "b"))
    assert evaluate_again(copy, asked, "lora", QUIET)["rows"] == 1  # the same base may lie elsewhere
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = r"base: the base has other weights \(model\.safetensors\) than those this adapter was trained on"
    write_json(copy / "results.json", {**read_json(copy / "results.json"), "subject": "lora"})
    for use in (
        lambda: evaluate_again(copy, asked, "lora", QUIET),
        lambda: chat_with(str(copy), Console()),
        lambda: export(copy, Wanted(to="merged", update="lora"), QUIET),
        lambda: line_up([str(copy)], "lora"),
        lambda: resolve(str(copy)),
    ):
        with pytest.raises(ModelError, match=said):
            use()
    assert open_model(str(copy), World(), "full")
    plan = read_json(copy / "plan.json")
    del plan["base"]
    write_json(copy / "plan.json", plan)
    assert open_model(str(copy), World(), "lora")  # of an earlier version, which kept no hashes


def test_two_runs_are_compared_on_rows_and_metrics_that_both_have(copy: Path, finished_run: Path) -> None:
    run_folder = finished_run.with_name("run")
    table = compare_runs(run_folder, copy)
    assert [row[0] for row in table] == ["exact_match", "token_f1"]
    assert all("(95%: " in row[3] and "n = 20" in row[3] for row in table)
    recipe = copy / "recipe.yaml"
    recipe.write_text(re.sub(r"level: 0\.95", "level: 0.99", recipe.read_text(encoding="utf-8")), encoding="utf-8")
    surer = compare_runs(run_folder, copy)
    assert all("(99%: " in row[3] for row in surer)  # the more careful of the two
    answers = RunFolder(path=copy).answers(read_json(copy / "results.json")["subject"])
    lines = read_jsonl(answers)
    write_jsonl(answers, [{**line, "scores": {"chrf": 1.0}} for line in lines])
    with pytest.raises(FolderError, match="share no metric"):
        compare_runs(run_folder, copy)
    write_jsonl(answers, [{**line, "id": f"other{place}"} for place, line in enumerate(lines)])
    with pytest.raises(FolderError, match="share no test row"):
        compare_runs(run_folder, copy)


def test_a_chat_ends_with_an_empty_line_or_the_input(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for typed in ("hello\nagain\n", "hello\n\nnever read\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        shown = io.StringIO()
        chat_with(str(finished_run.with_name("run")), Console(file=shown, width=200))
        assert "never read" not in shown.getvalue()


def test_a_chat_that_outgrows_the_context_goes_on_without_what_was_said_first(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n" + "word " * 20 + "\n" + "other " * 60 + "\n"))
    shown = io.StringIO()
    chat_with(str(finished_run.with_name("run")), Console(file=shown, width=200))
    assert shown.getvalue().count("longer than the model's context") == 1


def test_prompts_that_leave_the_context_no_room_for_an_answer_are_told(copy: Path, tmp_path: Path) -> None:
    asked = rows(tmp_path / "long.jsonl", ("Upper case of: " + "zyx " * 300, "ZYX"), ("Upper case of: zzz", "ZZZ"))
    said = Console(file=io.StringIO(), width=500)
    assert evaluate_again(copy, asked, "lora", Screen(console=said))["rows"] == 2
    assert "1 of 2 prompts leave no room for" in said.file.getvalue()  # type: ignore[attr-defined]
