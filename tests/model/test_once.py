"""What is converted or merged on first use is made once, whoever asks first."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from tunesmith.folder import manifest_problem
from tunesmith.model import load
from tunesmith.model.load import load_vocabulary, resolve
from tunesmith.model.write_gguf import write_gguf


@pytest.fixture(params=["convert_gguf", "merge_files"])
def base(
    request: pytest.FixtureRequest,
    tiny_model_folder: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A .gguf file or a finished run, as the base of another; each time that a folder is made of it is noted."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    really = getattr(load, request.param)

    def noted(*given: Any) -> Path:
        with (tmp_path / "calls").open("a") as calls:
            calls.write("x")
        return really(*given)

    monkeypatch.setattr(load, request.param, noted)
    if request.param == "merge_files":
        run = shutil.copytree(finished_run.with_name("run"), tmp_path / "run")
        (run / "results.json").write_text('{"subject": "lora"}')
        return str(run)
    vocabulary = load_vocabulary(str(tiny_model_folder))
    write_gguf(tiny_model_folder, tmp_path / "tiny.gguf", "f32", vocabulary, vocabulary.eos_ids[0], "tiny")
    return str(tmp_path / "tiny.gguf")


def test_processes_that_start_together_make_a_base_once(base: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=resolve, args=(base,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert manifest_problem(resolve(base)) == ""
    assert (tmp_path / "calls").read_text() == "x"


def test_what_a_killed_process_left_half_made_is_deleted_by_the_next(base: str, tmp_path: Path) -> None:
    made = resolve(base)
    left = made.with_name(f".{made.name}.1-0123abcd.tmp")
    made.rename(left)
    assert manifest_problem(resolve(base)) == ""
    assert not left.exists()
