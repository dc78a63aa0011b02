"""The fingerprint of a base: what it notices, what it leaves out, and that it reads little."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.folder import RunFolder, write_json
from tunesmith.model.pinned import base_problem, check_base, fingerprint

LARGE = 256 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a file of weights larger than what is read of it; the file has holes, so it takes no room."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "README.md", "manifest.json"):
        (folder / name).write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(LARGE)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunFolder:
    """A run that began with it."""
    folder = RunFolder(path=tmp_path / "run")
    write_json(folder.plan, {"base": fingerprint(base)})
    return folder


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.mark.parametrize("place", [8, 5000, LARGE // 2, LARGE - 5 * 1024 * 1024, LARGE - 1])
def test_a_change_as_wide_as_the_gap_between_two_blocks_is_noticed(base: Path, run: RunFolder, place: int) -> None:
    overwrite(base / "model.safetensors", place, b"x" * min(LARGE // 63, LARGE - place))
    assert base_problem(run, base) == "the base has other weights (model.safetensors)"


def test_another_size_alone_is_noticed(base: Path, run: RunFolder) -> None:
    os.truncate(base / "model.safetensors", LARGE + 1)
    assert base_problem(run, base)


def test_absent_added_and_changed_files_are_named_weights_first(base: Path, run: RunFolder) -> None:
    (base / "config.json").write_text("{ }")
    assert base_problem(run, base) == "the base has other files (config.json)"
    (base / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\(model-2\.safetensors\) than those this adapter was trained on"):
        check_base(run, base)
    (base / "model-2.safetensors").unlink()
    (base / "model.safetensors").unlink()
    assert base_problem(run, base) == "the base has other weights (model.safetensors)"


def test_what_loading_does_not_read_may_change(base: Path, run: RunFolder) -> None:
    for name in ("README.md", "manifest.json"):
        (base / name).write_text("other")
    assert base_problem(run, base) == ""


def test_nothing_is_said_of_runs_that_kept_no_fingerprint(base: Path, run: RunFolder, tmp_path: Path) -> None:
    write_json(run.plan, {"arms": {}})
    assert base_problem(run, base) == ""
    assert base_problem(RunFolder(path=tmp_path / "nowhere"), base) == ""


def test_a_damaged_header_does_not_ask_for_all_memory(base: Path) -> None:
    overwrite(base / "model.safetensors", 0, b"\xff" * 8)
    assert set(fingerprint(base)) == {"config.json", "model.safetensors"}
