"""An export opens in the program that it is for and is the model that was judged, or is not handed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tunesmith.errors import TunesmithError
from tunesmith.folder import manifest_problem, read_json, write_json
from tunesmith.pipeline import export as exports
from tunesmith.pipeline.export import Wanted, export
from tunesmith.pipeline.run import run as start
from tunesmith.recipe import parse_recipe
from tunesmith.screen import Screen

QUIET = Screen(quiet=True)
THOUGHTS = "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}"
SOURCE = Path(exports.__file__).parents[2]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run.with_name("run"), tmp_path / "run")


def kept(run: Path) -> set[str]:
    folder = run / "exports"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def rebased(run: Path, tmp_path: Path) -> Path:
    """Let the run's recipe name a copy of its base, which may then be changed: an old run knows of no hashes."""
    write_json(run / "plan.json", {key: value for key, value in read_json(run / "plan.json").items() if key != "base"})
    recipe = run / "recipe.yaml"
    (base,) = (line.removeprefix("base: ") for line in recipe.read_text().splitlines() if line.startswith("base: "))
    recipe.write_text(recipe.read_text().replace(base, str(tmp_path / "base")))
    return shutil.copytree(base, tmp_path / "base")


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "type_", "update", "name"),
    [
        ("adapter", "", "lora", "adapter"),
        ("merged", "", "lora", "merged"),
        ("merged", "bf16", "full", "merged-bf16"),
        ("merged", "", "full", "merged"),
    ],
)
def test_adapter_and_merged_pass_and_the_report_says_so(run: Path, to: str, type_: str, update: str, name: str) -> None:
    record = export(run, Wanted(to=to, type=type_, update=update), QUIET)
    assert record["reasons"] == []
    assert record["passed"]
    assert record["answers"]["unexplained"] == 0 or type_
    assert record["rows"] == record["judged_again"]["rows"] == 20
    assert record["score"]["metric"] == "exact_match"
    out = run / "exports" / name
    assert read_json(out / "parity.json") == read_json(run / "exports" / f"{name}.json")
    assert manifest_problem(out) == ""
    assert read_json(run / "results.json")["test_reads"] == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "passed" in page
    assert record["program"] in page


def test_what_a_killed_export_left_half_is_swept(run: Path) -> None:
    left = run / "exports" / ".merged.1-0123abcd.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    export(run, Wanted(to="adapter", checked=False, rows=2), QUIET)
    assert kept(run) == {"adapter", "adapter.json"}


def test_a_merged_model_answers_as_it_was_judged_and_not_as_its_makers_would_draw(run: Path, tmp_path: Path) -> None:
    base = rebased(run, tmp_path)
    theirs = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "pad_token_id": 0}
    write_json(base / "generation_config.json", theirs)
    export(run, Wanted(to="merged", checked=False, rows=2), QUIET)
    kept = read_json(run / "exports" / "merged" / "generation_config.json")
    assert kept == {"pad_token_id": 0, "eos_token_id": [2]}


def test_what_is_handed_over_does_not_think_unless_asked_as_it_was_judged(run: Path, tmp_path: Path) -> None:
    base = rebased(run, tmp_path)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("{% if", "{% if enable_thinking is false and", 1) + THOUGHTS)
    turns = [{"role": "user", "content": "Upper case of: abc"}]
    how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    theirs = AutoTokenizer.from_pretrained(base)
    judged = theirs.apply_chat_template(turns, **how, enable_thinking=False)
    for to in ("adapter", "merged"):
        export(run, Wanted(to=to, checked=False, rows=2), QUIET)
        ours = AutoTokenizer.from_pretrained(run / "exports" / to)
        assert ours.apply_chat_template(turns, **how) == judged != theirs.apply_chat_template(turns, **how)
        thinking = ours.apply_chat_template(turns, **how, enable_thinking=True)
        assert thinking == theirs.apply_chat_template(turns, **how, enable_thinking=True) != judged


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["f32", "f16", "q8_0", "q4_k_m"])
def test_a_gguf_passes_in_llama_cpp(run: Path, type_: str) -> None:
    pytest.importorskip("llama_cpp")
    record = export(run, Wanted(to="gguf", type=type_), QUIET)
    assert record["prompts"]["other_tokens"] == 0
    assert record["reasons"] == []
    out = run / "exports" / f"gguf-{type_}"
    assert {path.name for path in out.iterdir()} == {"Modelfile", "manifest.json", "parity.json", f"model-{type_}.gguf"}
    assert "TEMPLATE" in (out / "Modelfile").read_text()


@pytest.mark.slow
def test_a_policy_that_began_as_another_run_is_exported_with_its_base(
    run: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def shout(answer, item):\n    return float(sum(map(str.isupper, answer)))\n")
    raw = {
        "base": str(run),
        "method": "grpo",
        "reward": f"{own}:shout",
        "policy": {"rollouts": 2, "prompts": 4, "group": 3},
        "data": {"train": str(tiny_rows), "valid": 0.2, "test": 0.2},
        "task": {"max_new_tokens": 6},
        "train": {"learning_rate": 0.01, "evaluations": 1},
        "evaluate": {"forgetting": False, "rows": 12, "valid_rows": 6},
        "lora": {"rank": 4},
        "out": str(tmp_path / "policy"),
    }
    start(parse_recipe(raw))
    record = export(tmp_path / "policy", Wanted(to="adapter"), QUIET)
    assert record["reasons"] == []
    assert "sampled" in record["unscored"]
    config = read_json(tmp_path / "policy" / "exports" / "adapter" / "adapter_config.json")
    subject = read_json(run / "results.json")["subject"]
    assert config["base_model_name_or_path"] == str(run / ("model" if subject == "full" else "merged"))


@pytest.mark.slow
def test_a_changed_base_falls_short_and_keeps_the_older_export(run: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    export(run, Wanted(to="merged", update="lora", checked=False), QUIET)
    older = (run / "exports" / "merged" / "manifest.json").read_bytes()
    changed = rebased(run, tmp_path)
    weights = load_file(changed / "model.safetensors")
    draws = {name: torch.randn(weight.shape) for name, weight in weights.items()}
    save_file(draws, changed / "model.safetensors", metadata={"format": "pt"})
    record = export(run, Wanted(to="merged", update="lora"), QUIET)
    assert not record["passed"]
    assert any("the base or the adapter is not the one that was judged" in reason for reason in record["reasons"])
    assert (run / "exports" / "merged" / "manifest.json").read_bytes() == older
    assert kept(run) == {"merged", "merged.json", "merged.failed.json"}
    assert "fell short, not kept" in (run / "report.html").read_text(encoding="utf-8")


def test_unchecked_says_so_loudly(run: Path) -> None:
    record = export(run, Wanted(to="gguf", type="q4_0", update="full", checked=False), QUIET)
    assert (record["checked"], record["passed"]) == (False, False)
    assert read_json(run / "exports" / "gguf-q4_0" / "parity.json")["checked"] is False
    assert "NOT CHECKED" in (run / "report.html").read_text(encoding="utf-8")


def test_an_adapter_that_changed_since_it_was_written_is_refused(run: Path) -> None:
    adapter = run / "adapter"
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(TunesmithError, match="not what the run handed over"):
        export(run, Wanted(to="adapter", update="lora"), QUIET)
    assert kept(run) == set()


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    base = rebased(run, tmp_path)
    config = AutoConfig.from_pretrained(base)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(base)
    with pytest.raises(TunesmithError, match="has another shape"):
        export(run, Wanted(to="adapter", update="lora"), QUIET)
    assert kept(run) == set()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(to="onnx"), "unknown export 'onnx'"),
        (Wanted(to="gguf", type="q9"), "unknown type 'q9'"),
        (Wanted(to="adapter", type="q8_0"), "adapter has: f32"),
        (Wanted(to="merged", update="base"), "the run has no update 'base'"),
        (Wanted(to="adapter", update="full"), "there is no adapter\nUse --to merged, or --update lora."),
    ],
)
def test_what_cannot_be_exported_is_said_before_work(run: Path, wanted: Wanted, words: str) -> None:
    with pytest.raises(TunesmithError, match=words):
        export(run, wanted, QUIET)
    assert kept(run) == set()


def test_a_run_that_has_not_finished_or_judged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="not a run folder"):
        export(tmp_path / "nothing", Wanted(to="merged"), QUIET)
    (run / "answers" / "lora.jsonl").rename(tmp_path / "aside")
    with pytest.raises(TunesmithError, match="keeps no answers"):
        export(run, Wanted(to="merged", update="lora"), QUIET)
    (run / "results.json").unlink()
    with pytest.raises(TunesmithError, match="has not finished"):
        export(run, Wanted(to="merged"), QUIET)


def test_a_folder_of_something_else_is_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(TunesmithError, match="not an export"):
        export(run, Wanted(to="merged", out=tmp_path / "mine"), QUIET)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_without_the_program_to_check_with_the_way_to_get_it_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exports.PROGRAMS, "gguf", ("no_such_module", "llama-cpp-python"))
    with pytest.raises(TunesmithError, match=r"pip install 'llama-cpp-python'.*--unchecked"):
        export(run, Wanted(to="gguf", type="q8_0"), QUIET)
    with pytest.raises(TunesmithError, match="quantised by llama"):
        export(run, Wanted(to="gguf", type="q4_k_m", checked=False), QUIET)


def test_rows_that_become_other_prompts_are_refused(run: Path) -> None:
    path = run / "answers" / "lora.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text().splitlines()]
    first["prompt_tokens"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)))
    with pytest.raises(TunesmithError, match="prompt tokens when judged"):
        export(run, Wanted(to="merged", update="lora"), QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["merged", "gguf"])
def test_a_full_disk_is_told_and_loses_nothing(run: Path, to: str) -> None:
    before = contents(run)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        f"sys.argv = ['tunesmith', 'export', {str(run)!r}, '--to', {to!r}, '--unchecked']\n"
        "from tunesmith.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    full = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert "the disk is full" in full.stderr
    assert contents(run) == before


@pytest.mark.slow
def test_falling_short_is_exit_code_1_and_the_reason(run: Path) -> None:
    path = run / "answers" / "lora.jsonl"
    rows = [{**json.loads(line), "answer": "something else"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "tunesmith.cli", "export", str(run), "--to", "merged", "--update", "lora"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "falls short: only 0% of the answers that were judged are given again" in done.stdout
    assert kept(run) == {"merged.failed.json"}
