"""The run folder keeps what it was given: through kills, full disks, second runs and other recipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith import folder as disk
from tunesmith.errors import FolderError
from tunesmith.folder import RunFolder, append_jsonl, locked, open_run, read_json, read_jsonl, write_json, write_text
from tunesmith.types import Estimate

RECIPE = "base: tiny\ntrain:\n  epochs: 3\nout: runs/a\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process with the package on its path."""
    paths = [str(Path(disk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_new_folder_holds_the_recipe_and_opens_again(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "deep" / "run", RECIPE)
    assert folder.recipe.read_text() == RECIPE
    assert disk.is_run_folder(folder.path)
    assert open_run(folder.path, RECIPE) == folder


def test_a_moved_folder_opens_although_out_differs(tmp_path: Path) -> None:
    open_run(tmp_path / "a", RECIPE).path.rename(tmp_path / "b")
    assert open_run(tmp_path / "b", RECIPE.replace("runs/a", "runs/b")).path == tmp_path / "b"


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    open_run(tmp_path, RECIPE)
    with pytest.raises(FolderError, match=r"train\.epochs was 3, now 4") as caught:
        open_run(tmp_path, RECIPE.replace("3", "4"))
    assert "another `out`" in caught.value.fix
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(FolderError, match="something else"):
        open_run(tmp_path, RECIPE)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.doc"]


def test_a_file_in_the_way_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FolderError):
            open_run(path, RECIPE)


def test_a_path_that_cannot_be_looked_at_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="cannot be read"):
        disk.is_run_folder(tmp_path / ("x" * 300))


def test_a_damaged_recipe_is_reported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(FolderError, match="damaged"):
        open_run(tmp_path, RECIPE)


def test_what_a_killed_process_wrote_aside_is_swept(tmp_path: Path) -> None:
    open_run(tmp_path, RECIPE)
    (tmp_path / ".results.json.1-ab.tmp").write_text("half")
    (tmp_path / ".model.1-ab.tmp").mkdir()
    open_run(tmp_path, RECIPE)
    assert sorted(child.name for child in tmp_path.iterdir()) == [".lock", "recipe.yaml"]


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = open_run(tmp_path, RECIPE)
    with locked(folder):
        second = python(
            """
            import sys; from pathlib import Path
            from tunesmith.errors import FolderError
            from tunesmith.folder import open_run
            try: open_run(Path(sys.argv[1]), sys.argv[2])
            except FolderError as error: print(error)
            """,
            str(tmp_path),
            RECIPE,
        )
    assert f"in use by process {os.getpid()}" in second.stdout, second.stderr
    open_run(tmp_path, RECIPE)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    folder = open_run(tmp_path, RECIPE)
    killed = python(
        """
        import os, signal, sys; from pathlib import Path
        from tunesmith.folder import RunFolder, locked
        with locked(RunFolder(path=Path(sys.argv[1]))): os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(tmp_path),
    )
    assert killed.returncode == -9
    with locked(folder):
        assert folder.lock.read_text() == f"{os.getpid()}\n"


def test_a_kill_at_any_moment_of_a_write_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """Children are killed before each system call of the write, and inside the writing of the data."""
    done = python(
        """
        import os, resource, signal, sys; from pathlib import Path
        from tunesmith.folder import write_bytes
        folder, old, new = Path(sys.argv[1]), b"old" * 9000, b"new" * 9000

        def child(kill_at):
            if kill_at < 0:  # the kernel kills inside write(2), after this many bytes
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (-kill_at, -kill_at))
            calls = iter(range(100))
            for name in ("open", "fsync", "replace", "mkdir", "unlink", "close"):
                def fatal(*args, real=getattr(os, name), **options):
                    if next(calls) == kill_at: os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)
                setattr(os, name, fatal)
            write_bytes(folder / "file", new)
            os._exit(0)

        for kill_at in [-1, -4096, -20000, *range(20)]:
            (folder / "file").write_bytes(old)
            pid = os.fork()
            if pid == 0: child(kill_at)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            content = (folder / "file").read_bytes()
            assert content in (old, new), (kill_at, len(content))
            print(status, content[:3].decode())
            if status == 0: break
        """,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.splitlines()
    assert outcomes[:3] == ["-25 old"] * 3
    assert {"-9 old", "-9 new"} <= set(outcomes)
    assert outcomes[-1] == "0 new"


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    done = python(
        """
        import resource, sys; from pathlib import Path
        from tunesmith.errors import FolderError
        from tunesmith.folder import write_text
        file = Path(sys.argv[1]) / "file"
        write_text(file, "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try: write_text(file, "new" * 9000)
        except FolderError as error: print(error)
        print([child.name for child in file.parent.iterdir()], file.read_text())
        """,
        str(tmp_path),
    )
    assert "the disk is full" in done.stdout, done.stderr
    assert "Free some space" in done.stdout
    assert "['file'] old" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk_while_appending_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(FolderError, match="the disk is full"):
        append_jsonl(tmp_path / "metrics.jsonl", {"loss": 1.0})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderError, match="may not be"):
        write_text(tmp_path / "file", "text")


def test_a_read_only_file_system_is_named() -> None:
    with pytest.raises(FolderError, match="may not be"), disk.storage_errors(Path("results.json")):
        raise OSError(30, "Read-only file system")


def test_json_holds_dataclasses_arrays_and_no_nan(tmp_path: Path) -> None:
    estimate = Estimate(value=0.5, low=float("nan"), high=float("inf"), n=3, level=0.95)
    write_json(tmp_path / "a.json", {"e": estimate, "x": np.arange(2), "y": np.float32(0.5), "p": Path("q")})
    expected = {"e": {"value": 0.5, "low": None, "high": None, "n": 3, "level": 0.95}, "x": [0, 1], "y": 0.5, "p": "q"}
    assert read_json(tmp_path / "a.json") == expected


def test_damaged_or_absent_json_is_reported_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a":')
    for name in ("a.json", "b.json"):
        with pytest.raises(FolderError, match=name):
            read_json(tmp_path / name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    rows=st.lists(st.dictionaries(st.text(), st.text(max_size=8), max_size=2), min_size=1, max_size=4), data=st.data()
)
def test_a_torn_last_line_is_dropped_and_then_overwritten(
    tmp_path: Path, rows: list[dict], data: st.DataObject
) -> None:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    append_jsonl(path, *rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)), label="bytes that reached the disk")])
    kept = read_jsonl(path)
    assert kept == rows[: len(kept)]
    append_jsonl(path, {"next": 1})
    assert read_jsonl(path) == [*kept, {"next": 1}]


def test_a_damaged_line_inside_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(FolderError, match=r"rows\.jsonl:2: damaged"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_an_absent_table_has_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "rows.jsonl") == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with disk.written_aside(tmp_path / "model") as aside:
            (aside / "weights").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with disk.written_aside(tmp_path / "model") as aside:
            (aside / "weights").write_text(text)
        assert [child.name for child in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model" / "weights").read_text() == text


def test_the_manifest_tells_every_kind_of_damage(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    weights = tmp_path / "sub" / "weights"
    weights.write_bytes(b"abc")
    assert "missing" in disk.manifest_problem(tmp_path)
    disk.write_manifest(tmp_path)
    assert disk.manifest_problem(tmp_path) == ""
    weights.write_bytes(b"abd")
    assert "has changed" in disk.manifest_problem(tmp_path)
    assert disk.manifest_problem(tmp_path, hashes=False) == ""
    weights.write_bytes(b"ab")
    assert "2 bytes, not 3" in disk.manifest_problem(tmp_path, hashes=False)
    weights.unlink()
    assert "is missing" in disk.manifest_problem(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": ["weights"]}))
    assert "damaged" in disk.manifest_problem(tmp_path)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    folder = RunFolder(path=tmp_path)
    names = ("recipe", "ledger", "plan", "metrics", "checkpoints", "adapter", "model", "results", "report")
    assert [getattr(folder, name).name for name in names] == [
        *("recipe.yaml", "ledger.jsonl", "plan.json", "metrics.jsonl", "checkpoints"),
        *("adapter", "model", "results.json", "report.html"),
    ]
    assert folder.answers("few_shot") == tmp_path / "answers" / "few_shot.jsonl"


@pytest.mark.parametrize("arm", ["", "..", "../x", "a/b", "a\\b", ".hidden"])
def test_an_arm_cannot_leave_the_answers_folder(tmp_path: Path, arm: str) -> None:
    with pytest.raises(ValueError, match="arm"):
        RunFolder(path=tmp_path).answers(arm)
