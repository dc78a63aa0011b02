"""`tunesmith serve --engine vllm`: what vLLM is told, by a program of that name that writes down how it was called."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.load import NO_THOUGHTS, load_vocabulary
from tunesmith.screen import Screen
from tunesmith.serve.engine import Limits
from tunesmith.serve.hall import line_up
from tunesmith.serve.start import Door, serve
from tunesmith.serve.tuning import Shop
from tunesmith.serve.vllm import RANKS, arguments

from .conftest import SOURCE, Runs

STAND_IN = """#!{python}
import json, os, pathlib, signal, sys
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
told = {{
    "words": words,
    "key": os.environ.get("VLLM_API_KEY"),
    "ends": json.loads(pathlib.Path(option("--generation-config"), "generation_config.json").read_text()),
    "template": pathlib.Path(option("--chat-template")).read_text(),
}}
pathlib.Path({told!r}).write_text(json.dumps(told))
if {status}:
    sys.exit({status})
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: (print("drained", flush=True), sys.exit(0)))
print("ready", flush=True)
while True:
    signal.pause()
"""


def stand_in(folder: Path, status: int = 0) -> Path:
    """Writes the program; returns where it will say how it was called."""
    told, program = folder / "told.json", folder / "vllm"
    program.write_text(STAND_IN.format(python=sys.executable, told=str(told), status=status))
    program.chmod(0o755)
    return told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_vllm_gets_adapters_template_ends_and_key_and_ends_with_the_server(
    number: signal.Signals, runs: Runs, tmp_path: Path
) -> None:
    told = stand_in(tmp_path)
    command = [sys.executable, "-m", "tunesmith.cli", "serve", str(runs.a), str(runs.b), "--engine", "vllm"]
    command += ["--port", "0", "--key", "a-secret"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stderr
        assert run.stdout.readline() == "ready\n", run.stderr.read()
        run.send_signal(number)
        said, errors = run.communicate(timeout=60)
    assert (run.returncode, said) == (0, "drained\n"), errors
    found, vocabulary = json.loads(told.read_text()), load_vocabulary(str(runs.base))
    words = found["words"]
    assert words[:4] == ["serve", str(runs.base), "--served-model-name", "lively"]
    assert words[words.index("--lora-modules") + 1 :] == [f"a={runs.a}/adapter", f"b={runs.b}/adapter"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert found["ends"] == {"eos_token_id": list(vocabulary.eos_ids)}
    assert found["template"] == vocabulary.tokenizer.chat_template
    assert found["key"] == "a-secret"
    assert "a-secret" not in " ".join(words) + errors


def test_a_fully_tuned_run_is_the_base_itself(finished_run: Path, tmp_path: Path) -> None:
    run = finished_run.parent / "run"
    lineup = line_up([str(run)], "full")
    words = arguments(lineup, load_vocabulary(str(lineup.base)), ("127.0.0.1", 8000), 64, tmp_path)
    assert words[1:4] == [str(run / "model"), "--served-model-name", "run"]
    assert words[words.index("--max-model-len") + 1] == "64"
    assert "--enable-lora" not in words


def test_a_template_that_can_think_says_by_itself_that_there_are_no_thoughts(runs: Runs, tmp_path: Path) -> None:
    template = "{% if enable_thinking is false %}<think></think>{% endif %}"
    base = shutil.copytree(runs.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    arguments(line_up([str(runs.a)], ""), load_vocabulary(str(base)), ("127.0.0.1", 8000), 64, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == NO_THOUGHTS + template


def test_of_several_templates_vllm_chooses_by_itself_as_training_did(runs: Runs, tmp_path: Path) -> None:
    vocabulary = load_vocabulary(str(runs.base))
    vocabulary.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    words = arguments(line_up([str(runs.a)], ""), vocabulary, ("127.0.0.1", 8000), 64, tmp_path)
    assert "--chat-template" not in words


def test_a_rank_that_vllm_has_no_room_for_is_refused_with_the_way_out(runs: Runs, tmp_path: Path) -> None:
    lineup = line_up([str(runs.a)], "")
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text(json.dumps({"r": RANKS[-1] + 1}))
    lineup = replace(lineup, adapters=(replace(lineup.adapters[0], path=made),))
    with pytest.raises(ModelError, match="up to rank 512"):
        arguments(lineup, load_vocabulary(str(lineup.base)), ("127.0.0.1", 8000), 64, tmp_path)


def test_vllm_that_fails_or_is_not_there_is_one_clear_error(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    door = Door(port=0)
    with pytest.raises(ModelError, match="vLLM is not installed"):
        serve([str(runs.a)], door, Limits(), Screen(quiet=True), engine="vllm")
    stand_in(tmp_path, status=3)
    with pytest.raises(ModelError, match="vLLM ended with status 3"):
        serve([str(runs.a)], door, Limits(), Screen(quiet=True), engine="vllm")
    shop = Shop(folder=tmp_path / "jobs")
    with pytest.raises(RecipeError, match="takes no fine-tuning jobs"):
        serve([str(runs.a)], door, Limits(), Screen(quiet=True), engine="vllm", shop=shop)
