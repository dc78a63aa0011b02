"""The whole job on the tiny model: every kind of row and metric, and going on after a stop."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tunesmith import load_recipe, run
from tunesmith.errors import FolderError, RecipeError
from tunesmith.folder import RunFolder, read_json, read_jsonl, write_json, write_jsonl
from tunesmith.model.lora import lora_layers
from tunesmith.pipeline.again import open_model
from tunesmith.recipe import parse_recipe
from tunesmith.world import World

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path, tiny_recipe: Make) -> Callable[..., RunFolder]:
    """Runs the tiny recipe, with changes, in a folder of its own."""

    def start(changes: dict[str, Any]) -> RunFolder:
        raw = tiny_recipe({"out": str(tmp_path / "run"), "train.max_steps": 2, **changes})
        return run(parse_recipe(raw), root=tmp_path)

    return start


def results(folder: RunFolder) -> dict[str, Any]:
    return read_json(folder.results)


def nudge(weights: Path) -> None:
    """Change every number a little."""
    save_file({name: one + 0.01 for name, one in load_file(weights).items()}, weights, metadata={"format": "pt"})


def test_a_finished_run_leaves_everything_that_its_readers_want(finished_run: Path) -> None:
    folder = RunFolder(path=finished_run.with_name("run"))
    found = results(folder)
    assert set(found["arms"]) == {"base", "instructed", "few_shot", "nearest_neighbour", "majority", "lora", "full"}
    for arm in found["arms"]:
        lines = read_jsonl(folder.answers(arm))
        assert len(lines) == found["data"]["test"] == 20
        assert all(set(line["scores"]) - {"unended"} == {"exact_match", "token_f1"} for line in lines)
    assert set(found["forgetting"]) == {"lora", "full"}
    assert found["lora_versus_full"]["flops_fraction"] == pytest.approx(2 / 3)
    assert found["test_reads"] == 1
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    assert (folder.model / "model.safetensors").is_file()
    assert folder.report.is_file()
    assert set(read_json(folder.plan)["arms"]) == {"lora", "full"}


def test_a_finished_run_is_returned_as_it_is(finished_run: Path) -> None:
    folder = RunFolder(path=finished_run.with_name("run"))
    before = {
        path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file() and path != folder.lock
    }
    assert run(load_recipe(finished_run)) == folder
    after = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file() and path != folder.lock}
    assert after == before


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, which may be damaged."""
    return RunFolder(path=shutil.copytree(finished_run.with_name("run"), tmp_path / "copy"))


def again(folder: RunFolder) -> RunFolder:
    return run(load_recipe(folder.recipe).model_copy(update={"out": str(folder.path)}))


@pytest.mark.parametrize(("made", "file"), [("adapter", "adapter_model.safetensors"), ("model", "config.json")])
def test_a_finished_run_with_a_damaged_model_says_how_to_get_another(copy: RunFolder, made: str, file: str) -> None:
    whole = (copy.path / made / file).read_bytes()
    (copy.path / made / file).write_bytes(bytes(reversed(whole)))
    with pytest.raises(FolderError, match=rf"{made}/ is not what it handed over: {file} has changed.*\nDelete the run"):
        again(copy)
    (copy.path / made / file).write_bytes(whole)
    assert again(copy) == copy
    shutil.rmtree(copy.path / made)
    with pytest.raises(FolderError, match=rf"{made}/ is not what it handed over: manifest.json is missing"):
        again(copy)


def test_a_finished_run_without_its_page_gets_it_again(copy: RunFolder) -> None:
    page = copy.report.read_bytes()
    copy.report.unlink()
    again(copy)
    assert copy.report.read_bytes().replace(b"copy", b"run") == page.replace(b"copy", b"run")


def test_continued_pre_training_is_judged_by_loss(job: Callable[..., RunFolder], tmp_path: Path) -> None:
    rows = [{"text": f"{n} {chr(97 + n % 26) * 9} stands alone"} for n in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = job(
        {
            "data.train": str(tmp_path / "rows.jsonl"),
            "task": {"metric": "completion_loss"},
            "evaluate.forgetting": True,
            "train.max_steps": 20,
        }
    )
    found = results(folder)
    assert set(found["arms"]) == {"base", "lora"}
    (row,) = found["contrasts"]
    assert row["difference"]["value"] < 0
    assert found["verdict"]["decision"] in ("ship", "do not ship")  # the loss falls; much may be forgotten
    assert found["smallest_difference"]["value"] is None
    assert found["arms"]["lora"]["prompt_tokens_per_request"] == 0


def test_the_update_with_the_lower_loss_is_the_subject(job: Callable[..., RunFolder]) -> None:
    changes = {"task.metric": "completion_loss", "task.also": ["exact_match"], "update": ["lora", "full"]}
    folder = job({**changes, "train.max_steps": 4, "task.shots": 1})
    found = results(folder)
    losses = {name: read_json(folder.path / "trained" / f"{name}.json")["valid_metric"] for name in ("lora", "full")}
    assert found["subject"] == min(losses, key=lambda name: losses[name])
    assert set(found["arms"]["majority"]["metrics"]) == {"exact_match"}


def test_an_economy_run_is_compared_with_the_others_and_leaves_an_adapter_and_no_states(
    job: Callable[..., RunFolder],
) -> None:
    folder = job({"update": ["lora", "full", "economy"], "train": {"batch": 8, "epochs": 2}})
    found = results(folder)
    assert found["arms"]["economy"]["train"]["flops"] < 0.9 * found["arms"]["lora"]["train"]["flops"]
    assert set(found["economy_versus_full"]) == set(found["lora_versus_full"])
    pairs = [(one["a"], one["b"]) for one in found["contrasts"] if one["metric"] == "exact_match"]
    tuned = {pair for pair in pairs if set(pair) <= {"lora", "full", "economy"}}
    assert tuned == {("lora", "full"), ("lora", "economy"), ("economy", "full")}
    adapted = lora_layers(open_model(str(folder.path), World(), "economy").hf)
    assert {name.split(".")[2] for name in adapted} == {"1"}
    assert not list(folder.path.rglob("states-*"))
    assert "Economy (upper layers) " in folder.report.read_text()


def test_choices_can_decide(job: Callable[..., RunFolder], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} {chr(97 + n % 26) * 9}", "completion": "even" if n % 2 == 0 else "odd"} for n in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"metric": "choice_accuracy", "choices": ["even", "odd"], "shots": 1}
    found = results(job({"data.train": str(tmp_path / "rows.jsonl"), "data.near_duplicates": 1, "task": task}))
    assert 0 <= found["arms"]["lora"]["metrics"]["choice_accuracy"]["value"] <= 1
    assert set(found["arms"]) == {"base", "few_shot", "lora"}


def test_systems_follow_ups_and_tools_pass_through(
    job: Callable[..., RunFolder], tmp_path: Path, tools_model_folder: Path
) -> None:
    def row(n: int) -> dict[str, Any]:
        word = chr(97 + n % 26) * 5 + str(n)
        turns = [("system", "be brief"), ("user", word), ("assistant", "yes?"), ("user", "upper"), ("assistant", "A")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}

    write_jsonl(tmp_path / "rows.jsonl", [row(n) for n in range(60)])
    folder = job({"base": str(tools_model_folder), "data.train": str(tmp_path / "rows.jsonl"), "task.shots": 1})
    line = read_jsonl(folder.answers("lora"))[0]
    assert [turn["role"] for turn in line["prompt"]] == ["system", "user", "assistant", "user"]
    assert line["reference"] == "A"


def test_retention_is_measured_before_and_after(job: Callable[..., RunFolder], tmp_path: Path) -> None:
    questions = [{"prompt": f"{n}?", "choices": ["yes", "no", "maybe"], "answer": n % 3} for n in range(6)]
    write_jsonl(tmp_path / "keep.jsonl", questions)
    folder = job({"evaluate.retention": str(tmp_path / "keep.jsonl"), "evaluate.forgetting": True, "task.shots": 0})
    kept = results(folder)["forgetting"]["lora"]["general_accuracy"]
    assert kept["before"]["n"] == kept["after"]["n"] == 6


def test_each_file_format_and_a_split_in_files(job: Callable[..., RunFolder], tmp_path: Path, tiny_rows: Path) -> None:
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(r).encode() for r in rows[:80])))
    with (tmp_path / "valid.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(rows[80:90])
    pq.write_table(pa.Table.from_pylist(rows[90:]), tmp_path / "test.parquet")
    files = {"train": "train.jsonl.gz", "valid": "valid.csv", "test": "test.parquet"}
    found = results(job({f"data.{key}": str(tmp_path / name) for key, name in files.items()} | {"data.rows": 50}))
    assert found["data"]["train"] == 50
    assert found["data"]["test"] == 20


def test_a_built_in_task_runs(job: Callable[..., RunFolder]) -> None:
    pytest.importorskip("courts_db")
    changes = {"data.train": "builtin:legal_citations", "data.rows": 60, "task.shots": 1, "task.instructions": ""}
    assert results(job(changes))["data"]["train"] > 20


def test_two_rows_are_enough_to_run_and_too_few_for_a_verdict(
    job: Callable[..., RunFolder], tmp_path: Path, tiny_rows: Path
) -> None:
    lines = tiny_rows.read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:2]), ("valid", lines[2:3]), ("test", lines[3:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    files = {f"data.{name}": str(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "test")}
    found = results(job({**files, "task.shots": 5}))
    assert found["few_shot"]["k"] == 1
    assert found["verdict"]["decision"] == "not shown"


# Right until the tuned model's answers are graded; then as long as the file `stop` lies beside it, it fails.
STOPPING = """from pathlib import Path
calls = []
def f(answer, item):
    calls.append(1)
    assert len(calls) <= 8 * 3 + 20 * 4 + 16 or not Path(__file__).with_name("stop").exists()
    return 1.0
"""


@pytest.fixture
def stopped(job: Callable[..., RunFolder], tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """What was changed in the recipe of a run that stopped after training, for a reason outside its own files."""
    (tmp_path / "own.py").write_text(STOPPING)
    (tmp_path / "stop").touch()
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    changes = {"base": str(base), "task.metric": "own.py:f", "task.also": [], "task.shots": 0}
    with pytest.raises(RecipeError, match="AssertionError"):
        job(changes)
    (tmp_path / "stop").unlink()
    return changes


def test_a_run_goes_on_where_it_stopped(job: Callable[..., RunFolder], tmp_path: Path, stopped: dict[str, Any]) -> None:
    """Nothing before the stop is done again."""
    folder = RunFolder(path=tmp_path / "run")
    done = [folder.answers("base"), folder.path / "selection.json", folder.path / "trained" / "lora.json"]
    times = [path.stat().st_mtime_ns for path in done]
    assert results(job(stopped))["arms"]["lora"]["metrics"]["own.py:f"]["value"] == 1.0
    assert [path.stat().st_mtime_ns for path in done] == times
    assert "since it was resumed" in folder.report.read_text()  # not "whole run": the clock began anew


def test_a_metric_edited_between_stop_and_resume_is_refused(
    job: Callable[..., RunFolder], tmp_path: Path, stopped: dict[str, Any]
) -> None:
    """Else the base would be graded by the old code and the tuned model by the new."""
    (tmp_path / "own.py").write_text("def f(answer, item):\n    return 2.0\n")
    for _ in range(2):
        with pytest.raises(FolderError, match=r"the file of task\.metric has changed since this run began"):
            job(stopped)
    (tmp_path / "own.py").write_text(STOPPING)
    folder = job(stopped)
    (tmp_path / "own.py").write_text(STOPPING + "# after the end, as with rows\n")
    with pytest.raises(FolderError, match=r"the file of task\.metric has changed"):
        job(stopped)
    (tmp_path / "own.py").unlink()
    assert job(stopped) == folder


def test_a_base_with_other_weights_is_refused_on_resume(
    job: Callable[..., RunFolder], tmp_path: Path, stopped: dict[str, Any]
) -> None:
    nudge(tmp_path / "base" / "model.safetensors")
    folder = RunFolder(path=tmp_path / "run")
    with pytest.raises(FolderError, match=r"other weights \(model\.safetensors\) than when this run began"):
        job(stopped)
    plan = read_json(folder.plan)
    write_json(folder.plan, {key: value for key, value in plan.items() if key != "base"})
    assert results(job(stopped))  # a run that an earlier version began knows nothing of its base


def test_a_folder_without_finished_work_is_taken_over_by_a_changed_recipe(
    job: Callable[..., RunFolder], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def f(answer, item):\n    return 'x'\n")
    with pytest.raises(RecipeError, match="returned 'x'"):
        job({"task.metric": "own.py:f"})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "ledger.jsonl",
        "plan.json",
        "recipe.yaml",
    ]
    folder = job({"task.shots": 0})
    assert yaml.safe_load(folder.recipe.read_text())["task"]["metric"] == "exact_match"
    with pytest.raises(FolderError, match="belongs to another recipe"):
        job({"task.shots": 1})


def test_a_folder_with_a_recipe_of_the_users_own_is_left_alone(job: Callable[..., RunFolder], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("data: {train: mine.jsonl}\n")
    for _ in range(2):
        with pytest.raises(FolderError, match="belongs to another recipe"):
            job({})
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "data: {train: mine.jsonl}\n"


def test_rows_may_go_once_a_run_is_finished(job: Callable[..., RunFolder], tmp_path: Path, tiny_rows: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(tiny_rows.read_text())
    changes = {"data.train": str(rows), "task.shots": 0}
    folder = job(changes)
    rows.unlink()
    assert job(changes) == folder


def test_the_recipe_that_is_kept_runs_the_same(finished_run: Path) -> None:
    kept = finished_run.with_name("run") / "recipe.yaml"
    assert run(load_recipe(kept)).path == kept.parent
    assert os.fspath(kept.parent) == load_recipe(kept).out
