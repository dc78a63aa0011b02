"""The command line as a user meets it: what each command prints, and one clear message for whatever goes wrong."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tunesmith import __version__, cli, mistakes, recipe
from tunesmith.errors import RecipeError
from tunesmith.folder import RunFolder, locked

SOURCE = Path(cli.__file__).parents[1]
Make = Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    out: str
    err: str


class Shell:
    """`tunesmith` in this process, in a folder of its own."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.home, self.monkeypatch, self.capfd = home, monkeypatch, capfd

    def __call__(self, *words: object, stdin: str = "") -> Done:
        self.monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, words)])
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code: object = 0
        self.capfd.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = self.capfd.readouterr()
        return Done(code=int(str(code or 0)), out=out, err=err)

    def write(self, name: str, content: object) -> Path:
        path = self.home / name
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    return Shell(tmp_path, monkeypatch, capfd)


def process(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tunesmith` as a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE), **environment}
    command = [sys.executable, "-m", "tunesmith.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def refused(done: Done, *said: str) -> None:
    """One message on stderr with every one of `said`, exit code 2, nothing on stdout."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert done.err.count("error ") == 1, done.err
    assert done.out == ""
    for words in said:
        assert words in done.err, done.err


# What commands print


def test_run_in_a_process_says_the_verdict_and_a_second_time_at_once(tmp_path: Path, tiny_recipe: Make) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    first = process("run", "job.yaml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "NOT SHOWN" in first.stdout
    assert "choosing prompts" in first.stderr
    assert (tmp_path / "runs" / "job" / "report.html").is_file()
    again = process("run", "job.yaml", "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_name_between_colons_is_not_taken_for_a_picture(tmp_path: Path, shell: Shell, tiny_recipe: Make) -> None:
    (tmp_path / "own.py").write_text("import nowhere")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_recipe({"task.metric": "own.py:boom"})))
    refused(shell("run", "job.yaml", "--quiet"), "own.py:boom: the file fails to load")


def test_quiet_prints_nothing_and_sets_override(tmp_path: Path, tiny_recipe: Make) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_recipe({"evaluate.forgetting": True})))
    words = ["--quiet", "--set", "train.max_steps=2", "--set", "out=elsewhere", "--set", "train.learning_rate=1e-3"]
    done = process("run", "job.yaml", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    results = json.loads((tmp_path / "elsewhere" / "results.json").read_text())
    assert results["arms"]["lora"]["train"]["learning_rate"] == 1e-3
    assert results["arms"]["lora"]["train"]["steps"] == 2


def test_json_is_the_results_and_nothing_else(shell: Shell, finished_run: Path) -> None:
    done = shell("run", finished_run, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["schema"] == 1


def test_check_shows_the_ledger_and_the_trained_tokens(shell: Shell, tiny_recipe: Make, tiny_rows: Path) -> None:
    rows = tiny_rows.read_text() + '{"prompt": "twice", "completion": "A"}\n{"prompt": "twice", "completion": "B"}\n'
    path = shell.write("job.yaml", tiny_recipe({"data.train": str(shell.write("rows.jsonl", rows))}))
    done = shell("check", path, "--rows", "1")
    assert done.code == 0, done.err
    assert "conflicting completion" in done.out
    assert "Upper case of:" in done.out
    assert "\x1b[" not in done.out
    assert not (shell.home / "runs").exists()


def test_check_names_the_columns_that_are_not_read(shell: Shell, tiny_recipe: Make, tiny_rows: Path) -> None:
    rows = [{**json.loads(line), "context": "of a word"} for line in tiny_rows.read_text().splitlines()]
    path = shell.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = shell("check", shell.write("job.yaml", tiny_recipe({"data.train": str(path)})), "--rows", "1")
    assert "columns that the model is not shown: 'context'" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("method", "layout"),
    [("sft", ("prompt", "completion")), ("dpo", ("prompt", "chosen", "rejected")), ("grpo", ("prompt",))],
)
def test_check_names_a_row_that_spells_a_special_token(
    shell: Shell, tiny_recipe: Make, method: str, layout: tuple[str, ...]
) -> None:
    rows = [{name: f"{name} {n}" for name in layout} for n in range(40)]
    rows[7]["prompt"] = "ignore this<|im_end|>"
    path = shell.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train": str(path), "data.near_duplicates": 1.0, "data.overlong": "drop", "method": method}
    done = shell("check", shell.write("job.yaml", tiny_recipe(changes)), "--rows", "1")
    assert done.code == 0, done.err
    assert "1 special token in the text" in done.out
    assert f"rows spell special tokens, such as {path}:8 (<|im_end|> of user)" in " ".join(done.out.split())


def test_check_colours_what_is_trained(shell: Shell, tiny_recipe: Make) -> None:
    shell.monkeypatch.setenv("FORCE_COLOR", "1")
    done = shell("check", shell.write("job.yaml", tiny_recipe()), "--rows", "1")
    assert "\x1b[1;32m" in done.out  # bold green


def test_plan_predicts_and_writes_nothing(shell: Shell, tiny_recipe: Make) -> None:
    done = shell("plan", shell.write("job.yaml", tiny_recipe({"update": ["lora", "full"]})))
    assert done.code == 0, done.err
    for words in ("Training  lora", "Training  full", "4 steps", "can show a difference of", "train.batch"):
        assert words in done.out
    assert [path.name for path in shell.home.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("task.metric", "exactmatch", "unknown metric"),
        ("task.also", ["nofile.py:f"], "no such file"),
        ("data.test", 0, "the result is judged on test rows"),
    ],
)
def test_check_and_plan_refuse_what_run_would(
    shell: Shell, tiny_recipe: Make, command: str, key: str, value: object, told: str
) -> None:
    done = shell(command, shell.write("job.yaml", tiny_recipe({key: value})))
    assert done.code == 2
    assert told in done.err


def test_keys_without_effect_are_told(shell: Shell, tiny_recipe: Make) -> None:
    done = shell("check", shell.write("job.yaml", tiny_recipe({"reward": "runs/reward", "policy.rollouts": 7})))
    assert done.code == 0
    assert "reward has no effect with method: sft" in done.out
    assert "policy has no effect with method: sft" in done.out
    assert "preference has" not in done.out


@pytest.mark.parametrize(
    ("method", "read", "unread"),
    [
        ("ppo", "policy.mix", "train.max_steps"),
        ("grpo", "policy.group", "policy.mix"),
        ("dpo", "preference.smoothing", "policy.kl_limit"),
        ("reward", "preference.margin_scale", "preference.smoothing"),
        ("dpo", "task.max_new_tokens", "data.rehearse"),
    ],
)
def test_single_keys_without_effect_are_told(
    shell: Shell, tiny_recipe: Make, tmp_path: Path, method: str, read: str, unread: str
) -> None:
    lines = [json.dumps({"prompt": f"Say {n}", "chosen": f"A{n}", "rejected": f"a{n}"}) for n in range(40)]
    (tmp_path / "choices.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clean = {"task": {}, "train": {}, "data.train": str(tmp_path / "choices.jsonl"), "data.near_duplicates": 1.0}
    changes = {**clean, "method": method, read: 0.25 if "max" not in read else 7, unread: 0.25}
    changes |= {key: 7 for key in (read, unread) if key.endswith(("group", "steps"))}
    done = shell("check", shell.write("job.yaml", tiny_recipe(changes)))
    assert done.code == 0, done.err
    assert [line.strip() for line in done.out.splitlines() if "no effect" in line] == [
        f"note {unread} has no effect with method: {method}"
    ]


def test_evaluate_grades_other_rows_as_json(shell: Shell, finished_run: Path) -> None:
    line = '{"prompt": "Upper case of: zzz", "completion": "ZZZ"}\n'
    data = shell.write("new.jsonl", line + line)
    done = shell("evaluate", finished_run.with_name("run"), "--data", data, "--update", "lora")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["rows"], found["left_out"]) == (1, {"exact duplicate": 1})
    assert "1 rows are left out: exact duplicate" in done.err
    assert set(found["metrics"]) == {"exact_match", "token_f1", "unended"}


def test_compare_pairs_two_runs(shell: Shell, finished_run: Path) -> None:
    run = finished_run.with_name("run")
    done = shell("compare", run, run)
    assert done.code == 0, done.err
    assert "+0.0000 (" in done.out
    assert "n = 20" in done.out


def test_report_is_written_again(shell: Shell, finished_run: Path) -> None:
    copy = shutil.copytree(finished_run.with_name("run"), shell.home / "copy")
    (copy / "report.html").unlink()
    done = shell("report", copy)
    assert done.code == 0, done.err
    assert "NOT SHOWN" in done.out
    assert (copy / "report.html").is_file()


def test_chat_answers_what_is_piped_in(shell: Shell, finished_run: Path) -> None:
    done = shell("chat", finished_run.with_name("run"), stdin="hello\n")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("you ") == 2


def test_ctrl_c_ends_with_one_sentence(shell: Shell, finished_run: Path) -> None:
    class Pressed(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    shell.monkeypatch.setattr(io, "StringIO", Pressed)
    done = shell("chat", finished_run.with_name("run"))
    assert done.code == 130
    assert done.err == "stopped; run the same command to go on\n"


def test_doctor_lists_the_machine(shell: Shell) -> None:
    done = shell("doctor")
    assert done.code == 0, done.err
    assert "float32 products" in done.out


def test_round_says_what_it_cost_and_refuses_to_write_over_something(shell: Shell, tiny_model_folder: Path) -> None:
    done = shell("round", tiny_model_folder, "--out", shell.home / "rounded", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["general_loss"]["change"]["n"] > 0
    done = shell("round", tiny_model_folder, "--out", shell.home / "rounded")
    assert done.code == 2
    assert "Give another folder as --out" in done.err


def test_what_a_command_leaves_is_still_collected(shell: Shell) -> None:
    assert shell("check", "nowhere.yaml").code == 2
    assert gc.isenabled()


def test_schema_is_the_one_that_is_shipped(shell: Shell) -> None:
    """To write it again: tunesmith schema > src/tunesmith/recipe.schema.json"""
    shipped = Path(recipe.__file__).with_name("recipe.schema.json").read_text(encoding="utf-8")
    assert shell("schema").out == shipped
    assert json.loads(shipped) == recipe.Recipe.model_json_schema()
    assert "train.learning_rate" in shell("schema", "--keys").out.splitlines()


def test_every_key_of_a_recipe_has_a_meaning_that_can_be_read(shell: Shell) -> None:
    rows = recipe.described_keys()
    assert not [key for key, _, meaning in rows if not meaning]
    groups = {"data", "task", "task.teacher", "train", "lora", "preference", "reward", "policy", "evaluate"}
    assert {key for key, _, _ in rows} == set(recipe.known_keys()) - groups
    told = shell("schema", "--table").out
    assert all(key.split(".")[-1] in told for key, _, _ in rows)
    assert ("lora.alpha", "32.0") in [(key, default) for key, default, _ in rows]


@pytest.mark.parametrize("words", [["--version"], ["version"]])
def test_the_version_is_told(shell: Shell, words: list[str]) -> None:
    done = shell(*words)
    assert (done.code, done.out.strip()) == (0, __version__)


def test_what_is_no_recipe_is_told_what_it_is(shell: Shell, finished_run: Path) -> None:
    run, data = finished_run.with_name("run"), shell.write("tickets.jsonl", '{"prompt": "a", "completion": "b"}\n')
    for command in ("run", "check", "plan", "label"):
        refused(
            shell(command, run), "this is a run folder\nName the recipe that it was made from, to go on; `tunesmith"
        )
        refused(shell(command, data), "these are data, not a recipe\nWrite a recipe, a YAML file, that names them:\n")
    named = shell.write("tickets.jsonl.yaml", "data: {train: gone.jsonl}\n")
    assert "gone.jsonl: no such file" in shell("plan", named).err


def test_shipped_recipes_point_editors_at_the_schema() -> None:
    for path in (SOURCE.parent / "recipes").glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        schema = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / schema).resolve() == Path(recipe.__file__).with_name("recipe.schema.json").resolve()


# What is wrong on the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--bogus", "x.yaml"], "No such option"),
        (["run"], "recipe"),
        (["evaluate", "runs/x"], "Missing option '--data'"),
        (["run", "x.yaml", "train.epochs=2"], "--set train.epochs=2"),
        (["run", "x.yaml", "--train.epochs=2"], "--set train.epochs=2"),
    ],
)
def test_wrong_words_are_explained(shell: Shell, words: list[str], said: str) -> None:
    done = shell(*words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    done = process("report", "nowhere", "--debug", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "nowhere"], ["nowhere: no results.json"]),
        (["compare", "nowhere", "nowhere"], ["nowhere: the run has no results.json", "tunesmith run"]),
        (["evaluate", "nowhere", "--data", "x.jsonl"], ["nowhere: not a run folder"]),
        (["chat", "./nowhere"], ["no such model folder"]),
    ],
)
def test_a_folder_that_is_no_run_is_named(shell: Shell, words: list[str], said: list[str]) -> None:
    refused(shell(*words), *said)


def test_an_unknown_update_and_missing_rows_are_named(shell: Shell, finished_run: Path) -> None:
    run, data = finished_run.with_name("run"), shell.write("one.jsonl", '{"prompt": "a", "completion": "b"}\n')
    refused(shell("evaluate", run, "--data", data, "--update", "lara"), "--update: the run has no update 'lara'")
    refused(shell("evaluate", run, "--data", "gone.jsonl"), "gone.jsonl: no such file")


# What is wrong in a recipe: each a message, exit code 2, and no run folder


def test_a_missing_recipe_is_named(shell: Shell) -> None:
    refused(shell("run", "gone.yaml"), "gone.yaml: no such recipe")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: [", "job.yaml: not valid YAML"),
        ("- 1\n", "job.yaml: a recipe is a mapping of keys"),
        ("", "job.yaml: a recipe is a mapping of keys"),
        ("base: x\n", "job.yaml: the key 'data' is missing"),
        ("base: x\ndata: {valid: 0.2}\n", "job.yaml:2: the key 'data.train' is missing"),
        ("base: x\ndata: {train: a.jsonl}\nbase: y\n", "job.yaml: not valid YAML: the key 'base' stands twice"),
        ("data: {train: a.jsonl}\nout: 2020-99-99\n", "job.yaml: not valid YAML"),
        ("data: rows.jsonl\n", "job.yaml:1: data = 'rows.jsonl': here stand keys, not a value"),
        ("data: {train: a.jsonl}\ntrain:\n", "job.yaml:2: train = None: here stand keys"),
        ("data: {train: ''}\n", "job.yaml:1: data.train = ''"),
        ("data: {train: a.jsonl}\n1: x\n", "job.yaml:2: "),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(shell: Shell, text: str, said: str) -> None:
    refused(shell("run", shell.write("job.yaml", text)), said)


def test_all_mistakes_of_a_recipe_are_told_at_once_each_with_its_line(shell: Shell) -> None:
    text = """\
train: {epochs: -1}
data:
  train: rows.jsonl
  valid: 1.5
  layuot: auto
task:
  also: [chrf, 1]
update:
  - lora
  - ful
"""
    done = shell("run", shell.write("job.yaml", text), "--set", "train.batch=0", "--set", "evaluate.rows=1")
    refused(done, "job.yaml: 6 mistakes")
    places = [line.split(": ")[0] for line in done.err.splitlines()[1:] if not line.startswith("    ")]
    lines = [f"{shell.home / 'job.yaml'}:{line}" for line in (1, 4, 5, 7, 10)]
    assert places == [*lines, "--set train.batch"]
    assert "unknown key 'data.layuot'\n    Did you mean 'data.layout'?" in done.err
    assert "task.also = 1: Input should be a valid string\n    Put it in quotes" in done.err
    assert "data.valid = 1.5: Input should be less than 1\n    Write there: a fraction of train, or a file." in done.err
    assert not (shell.home / "runs").exists()


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("num_train_epochs", "train.epochs"),
        ("train.per_device_train_batch_size", "train.batch"),
        ("gradient_accumulation_steps", "train.batch"),
        ("train.lora_r", "lora.rank"),
        ("lora.target_modules", "lora.target"),
        ("max_seq_length", "data.max_tokens"),
        ("data.dataset", "data.train"),
        ("model", "base"),
        ("output_dir", "out"),
    ],
)
def test_a_key_of_another_tool_is_told_by_its_name_here(shell: Shell, tiny_recipe: Make, key: str, ours: str) -> None:
    path = shell.write("job.yaml", tiny_recipe())
    refused(shell("run", path, "--set", f"{key}=8"), f"unknown key '{key}'\nHere it is '{ours}'")


def test_what_nobody_has_to_choose_is_told_to_be_left_out(shell: Shell, tiny_recipe: Make) -> None:
    refused(shell("run", shell.write("job.yaml", tiny_recipe({"lora.dropout": 0.1}))), "Leave it out")


def test_what_other_tools_call_our_keys_names_keys_that_there_are_and_none_twice() -> None:
    theirs = [name for names in mistakes.ELSEWHERE.values() for name in names] + sorted(mistakes.NOT_HERE)
    assert set(mistakes.ELSEWHERE) <= set(recipe.known_keys())
    assert len(theirs) == len(set(theirs))
    assert not set(theirs) & set(recipe.known_keys())


def test_a_wrong_recipe_is_told_alike_in_python_and_in_a_file() -> None:
    with pytest.raises(RecipeError, match=r"recipe: data = 'x\.jsonl': .*\nWrite data: \{train: x\.jsonl\}\."):
        recipe.Recipe(data="x.jsonl")  # pyright: ignore[reportArgumentType]
    assert recipe.Recipe(data=recipe.DataSpec(train="x.jsonl")).data.train == "x.jsonl"


@pytest.mark.parametrize("command", ["run", "distill", "check", "plan"])
def test_mistakes_of_a_recipe_do_not_wait_for_torch(shell: Shell, command: str) -> None:
    path = shell.write("job.yaml", "data: rows.jsonl\n")
    lines = ["import atexit, sys", "from tunesmith import cli", f"sys.argv = ['tunesmith', {command!r}, {str(path)!r}]"]
    lines += ["atexit.register(lambda: print('torch' in sys.modules))", "cli.main()"]
    words = [sys.executable, "-c", "\n".join(lines)]
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert "job.yaml:1: data = 'rows.jsonl'" in done.stderr


def test_a_group_of_keys_that_set_replaces_has_no_lines_in_the_file(shell: Shell, tiny_recipe: Make) -> None:
    path = shell.write("job.yaml", tiny_recipe({"train": {"epochs": 2}}))
    refused(shell("run", path, "--set", "train={epochs: -1}"), "error --set train: train.epochs = -1")


def test_a_recipe_that_is_not_utf_8_names_its_line(shell: Shell) -> None:
    (shell.home / "job.yaml").write_bytes("base: x\n# naïve\n".encode("latin-1"))
    refused(shell("run", "job.yaml"), "job.yaml:2: not UTF-8", "Save the file as UTF-8.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.1}, ["unknown key 'learning_rate'", "'train.learning_rate'"]),
        ({"task.metrics": "chrf"}, ["unknown key 'task.metrics'", "'task.metric'"]),
        ({"train.learning_rate": 2}, ["train.learning_rate = 2", "less than 1"]),
        ({"data.valid": 1.5}, ["data.valid = 1.5", "less than 1"]),
        ({"update": ["lara"]}, ["update = 'lara'", "'lora', 'full' or 'economy'"]),
        ({"update": []}, ["update = []: name lora"]),
        ({"task.metric": "exact_mach"}, ["task.metric: unknown metric", "'exact_match'"]),
        ({"task.metric": "regex"}, ["task.pattern"]),
        ({"method": "dpo"}, ["method: these rows hold single answers"]),
        ({"data.test": 0}, ["data.test: the result is judged on test rows"]),
        ({"data.valid": 0}, ["data.valid: prompts and weights are chosen"]),
        ({"data.valid": 0.6, "data.test": 0.5}, ["leave nothing to train on"]),
        ({"data.train": "gone.jsonl"}, ["gone.jsonl: no such file"]),
        ({"data.train": "builtin:nothing"}, ["nothing"]),
        ({"evaluate.retention": "gone.jsonl"}, ["gone.jsonl: no such file"]),
        ({"base": "smollm3"}, ["base: smollm3: no such model folder"]),
        ({"task.metric": "choice_accuracy"}, ["rows.jsonl:", "there are no choices"]),
        ({"task.metric": "choice_accuracy", "task.choices": ["A", "B"]}, ["is none of task.choices"]),
        ({"task.metric": "own.py:f"}, ["own.py:f: no such file"]),
        ({"task.choices": [True, False]}, ["task.choices = True", "Put it in quotes"]),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_explained(
    shell: Shell, tiny_recipe: Make, changes: Mapping[str, object], said: list[str]
) -> None:
    refused(shell("run", shell.write("job.yaml", tiny_recipe(changes))), *said)
    assert not (shell.home / "runs").exists()


def test_a_tilde_is_the_home_folder(shell: Shell) -> None:
    shell.monkeypatch.setenv("HOME", "/home/ann")
    read = recipe.load_recipe(shell.write("job.yaml", "data: {train: ~/a.csv, valid: ~/b.csv}\nout: ~/runs/a\n"))
    assert (read.data.train, read.data.valid, read.out) == ("/home/ann/a.csv", "/home/ann/b.csv", "/home/ann/runs/a")


def test_thumbs_up_and_down_are_told_from_choices(shell: Shell, tiny_recipe: Make) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 2 == 0} for n in range(40)]
    data = shell.write("thumbs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recipe = shell.write("job.yaml", tiny_recipe({"method": "dpo", "data.train": str(data)}))
    done = shell("run", recipe)
    assert done.code == 2
    assert "A label of true or false, as KTO learns from, is no choice" in done.err


@pytest.mark.parametrize("override", ["epochs", "=3", "data.train.x=1", "train.epochs=[", "out=2020-99-99"])
def test_a_bad_override_is_explained(shell: Shell, tiny_recipe: Make, override: str) -> None:
    refused(shell("run", shell.write("job.yaml", tiny_recipe()), "--set", override), "--set")


# What is wrong with the rows

ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["rows.jsonl: the file is empty"]),
        (ROW + '{"prompt": "a"', ["rows.jsonl:2: not valid JSON"]),
        ('{"colour": "red", "size": 3}\n', ["rows.jsonl:1", "'colour', 'size'", "prompt + completion"]),
        ('{"prompt": "zebra", "chosen": "b", "rejected": "c"}\n', ["method: these rows are preference pairs"]),
        ('{"prompt": "", "completion": "b"}\n', ["no row of train is left of 1: 1 empty prompt", "rows.jsonl:1"]),
        (
            "".join(f'{{"text": "sentence number {n}"}}\n' for n in range(20)),
            ["plain text asks nothing", "completion_loss"],
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "pilot", "content": "b"}]}\n',
            ["rows.jsonl:1", "role 'pilot'"],
        ),
    ],
    ids=["empty", "json", "columns", "preferences", "all dropped", "plain text", "role"],
)
def test_rows_that_cannot_be_used_name_their_line(
    shell: Shell, tiny_recipe: Make, tiny_rows: Path, text: str, said: list[str]
) -> None:
    test = str(shell.write("held.jsonl", ROW))
    held_out = {} if "sentence" in text else {"data.valid": str(tiny_rows), "data.test": test}
    changes = {"data.train": str(shell.write("rows.jsonl", text)), **held_out}
    refused(shell("run", shell.write("job.yaml", tiny_recipe(changes))), *said)
    assert not (shell.home / "runs").exists()


def test_a_row_that_is_too_long_is_an_error_or_dropped_as_the_recipe_says(
    shell: Shell, tiny_recipe: Make, tiny_rows: Path
) -> None:
    long = json.dumps({"prompt": "x" * 600, "completion": "y"})
    rows = shell.write("rows.jsonl", tiny_rows.read_text() + long + "\n")
    path = shell.write("job.yaml", tiny_recipe({"data.train": str(rows), "data.max_tokens": 100}))
    refused(shell("run", path), "rows.jsonl:121", "more than max_tokens = 100", "data.overlong: drop")
    done = shell("check", path, "--set", "data.overlong=drop")
    assert done.code == 0, done.err
    assert "1 too many tokens" in done.out


def test_training_rows_that_stand_in_the_test_file_are_dropped_and_told(
    shell: Shell, tiny_recipe: Make, tiny_rows: Path
) -> None:
    test = shell.write("test.jsonl.gz", "")
    test.write_bytes(gzip.compress("".join(tiny_rows.read_text().splitlines(keepends=True)[:5]).encode()))
    done = shell("check", shell.write("job.yaml", tiny_recipe({"data.test": str(test)})))
    assert done.code == 0, done.err
    assert "leakage" in done.out
    assert "same row as held-out" in done.out


# What is wrong with the base model


def test_a_model_folder_that_cannot_be_used_is_explained(
    shell: Shell, tiny_recipe: Make, tiny_model_folder: Path
) -> None:
    model = shell.home / "model"
    path = shell.write("job.yaml", tiny_recipe({"base": str(model)}))
    refused(shell("run", path), "no such model folder")
    model.mkdir()
    refused(shell("run", path), "config.json is missing")
    shutil.copytree(tiny_model_folder, model, dirs_exist_ok=True)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(shell("run", path), "no .safetensors weights", "pickled weights are never opened")
    (model / "pytorch_model.bin").rename(model / "model.safetensors")
    tensors = load_file(model / "model.safetensors")
    spoilt = {name: tensor * float("nan") if "up_proj" in name else tensor for name, tensor in tensors.items()}
    save_file(spoilt, model / "model.safetensors", metadata={"format": "pt"})
    refused(shell("run", path), "cannot load the model: its log-probabilities are not numbers")
    os.truncate(model / "model.safetensors", 1000)
    refused(shell("run", path), "cannot load the model")
    (model / "tokenizer.json").unlink()
    refused(shell("run", path), "the tokenizer is missing")
    assert not (shell.home / "runs").exists()


def test_a_template_that_cannot_hold_the_rows_names_the_row(
    shell: Shell, tiny_recipe: Make, tiny_model_folder: Path
) -> None:
    model = shutil.copytree(tiny_model_folder, shell.home / "model")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    (model / "chat_template.jinja").write_text(template + (model / "chat_template.jinja").read_text())
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    rows = shell.write("rows.jsonl", json.dumps({"messages": turns}) + "\n")
    path = shell.write("job.yaml", tiny_recipe({"base": str(model), "data.test": str(rows)}))
    refused(shell("run", path), "rows.jsonl:1", "the chat template cannot render this row: no system turn")


# What is wrong with the run folder


def test_a_folder_in_use_names_the_process(shell: Shell, finished_run: Path) -> None:
    with locked(RunFolder(path=finished_run.with_name("run"))):
        refused(shell("run", finished_run), f"in use by process {os.getpid()}")


def test_a_folder_of_another_recipe_names_what_differs(shell: Shell, finished_run: Path) -> None:
    done = shell("run", finished_run, "--set", "train.max_steps=9")
    refused(done, "belongs to another recipe: train.max_steps was 4, now 9", "another `out`")


def test_a_folder_of_something_else_is_left_alone(shell: Shell, tiny_recipe: Make) -> None:
    (shell.home / "thesis").mkdir()
    (shell.home / "thesis" / "draft.txt").touch()
    refused(shell("run", shell.write("job.yaml", tiny_recipe({"out": "thesis"}))), "holds files of something else")
    assert [path.name for path in (shell.home / "thesis").iterdir()] == ["draft.txt"]


def test_a_folder_that_cannot_be_written_is_named(shell: Shell, tiny_recipe: Make) -> None:
    refused(shell("run", shell.write("job.yaml", tiny_recipe({"out": "/proc/nowhere/run"}))), "/proc/nowhere")


def test_rows_that_changed_since_the_run_are_noticed(shell: Shell, tiny_recipe: Make, tiny_rows: Path) -> None:
    rows = shell.write("rows.jsonl", tiny_rows.read_text())
    path = shell.write("job.yaml", tiny_recipe({"data.train": str(rows), "task.shots": 0}))
    assert shell("run", path, "--quiet").code == 0
    shell.write("rows.jsonl", tiny_rows.read_text() + ROW)
    refused(shell("run", path), "the file of data.train has changed since this run began")


# What goes wrong on the way


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(answer, item): return 1 / 0\n", ["ZeroDivisionError", "(line 1)"]),
        ("def f(answer, item): return 'good'\n", ["returned 'good'", "finite number"]),
        ("def g(answer, item): return 1.0\n", ["no function 'f'"]),
        ("import nothing_of_the_kind\n", ["the file fails to load"]),
    ],
    ids=["raises", "text", "name", "import"],
)
def test_a_metric_of_the_users_own_that_fails_can_be_mended(
    shell: Shell, tiny_recipe: Make, code: str, said: list[str]
) -> None:
    shell.write("own.py", code)
    path = shell.write("job.yaml", tiny_recipe({"task.metric": "own.py:f", "train.max_steps": 1, "task.shots": 0}))
    refused(shell("run", path), "own.py:f", *said)
    # A corrected recipe takes the folder over, as nothing was finished in it.
    assert shell("run", path, "--set", "task.metric=exact_match", "--quiet").code == 0


def test_a_loss_that_is_no_number_names_step_and_rows(shell: Shell, tiny_recipe: Make) -> None:
    done = shell("run", shell.write("job.yaml", tiny_recipe({"lora.alpha": 1e38, "task.shots": 0})))
    refused(done, "rows ", "of step 1 is not a finite number", "Lower train.learning_rate")


def test_a_full_disk_is_told_and_the_run_goes_on_afterwards(tmp_path: Path, tiny_recipe: Make) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_recipe({"task.shots": 0, "update": "full"})))
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "from tunesmith.cli import main; sys.argv = ['tunesmith', 'run', 'job.yaml']; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    full = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert "the disk is full" in full.stderr
    assert "run again" in full.stderr
    done = process("run", "job.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == 1
