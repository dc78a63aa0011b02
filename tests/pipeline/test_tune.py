"""Training one update: whatever kills it, the same command ends with the same bytes."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.errors import Interrupted
from tunesmith.folder import RunFolder, locked, manifest_problem, open_run, read_json, read_jsonl, write_json
from tunesmith.model.sample import Sampling
from tunesmith.pipeline import tune as module
from tunesmith.pipeline.begin import Place
from tunesmith.pipeline.tune import Material, Tuned, tune
from tunesmith.recipe import Recipe, Update, dump_recipe, parse_recipe
from tunesmith.screen import Screen
from tunesmith.train.optim import Optimization
from tunesmith.types import Example, Item, Message
from tunesmith.world import World

Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> Recipe:
    return parse_recipe(
        {
            "base": str(tiny_model_folder),
            "data": {"train": "rows.jsonl"},
            "update": ["lora", "full"],
            "train": {"batch": 8, "epochs": 2, "max_steps": 10, "evaluations": 3, "learning_rate": 0.01},
            "lora": {"rank": 4},
        }
    )


@pytest.fixture
def material(tiny_examples: list[Example]) -> Material:
    items = [
        Item(prompt=(Message(role="user", content=f"Upper case of: {word}"),), reference=word.upper(), id=word)
        for word in ("abc", "dad", "fee")
    ]
    return Material(
        train=tiny_examples[:40],
        valid=tiny_examples[80:90],
        valid_items=items,
        metric="exact_match",
        grade=lambda items, answers: [float(i.reference == a) for i, a in zip(items, answers, strict=True)],
        how=Sampling(max_new_tokens=3),
    )


@pytest.fixture
def work(recipe: Recipe, material: Material, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Update], Tuned]:
    """Open the run folder and train in it, with a checkpoint after every step."""
    monkeypatch.setattr(module, "Optimization", functools.partial(Optimization, checkpoint_seconds=0.0))

    def run(path: Path, update: Update, screen: Screen | None = None) -> Tuned:
        folder = open_run(path, dump_recipe(recipe))
        with locked(folder):
            if not folder.plan.is_file():
                write_json(folder.plan, {"derived": [], "arms": {}})
            screen = screen or Screen(quiet=True)
            place = Place(recipe=recipe, folder=folder, root=path, world=World(), screen=screen, started=0.0)
            return tune(place, update, material)

    return run


def hashes(path: Path, update: Update) -> dict[str, str]:
    """SHA-256 of every file that is handed over, and of the best weights."""
    folder = RunFolder(path=path)
    target = folder.handed_over(update)
    files = [*sorted(target.rglob("*")), folder.checkpoints / update / "best.safetensors"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def losses(path: Path) -> list[tuple[object, ...]]:
    """What metrics.jsonl says, without what depends on the clock."""
    kept = ("arm", "step", "loss", "valid_loss", "valid_metric", "tokens", "learning_rate")
    return [tuple(line.get(key) for key in kept) for line in read_jsonl(RunFolder(path=path).metrics)]


def dies_at(operation: int, path: Path, work: Callable[[], object]) -> None:
    """Do `work`, killed by SIGKILL just before its n-th opening, renaming or removing of a file below `path`."""
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        watched = event == "open" or event.startswith(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"))
        if watched and str(args[0]).startswith(str(path)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["lora", "full", "economy"])
def test_a_kill_before_any_file_operation_changes_no_byte(
    update: Update, work: Callable[[Path, Update], Tuned], fork: Fork, tmp_path: Path
) -> None:
    """Every life of the run gets a little further than the one before, until one is not killed any more."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work(whole, update)
    lives = 0
    for operation in range(10, 2000, 2):
        child = fork(lambda n=operation: dies_at(n, killed, lambda: work(killed, update)))
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        lives += 1
    assert lives >= 20
    assert hashes(killed, update) == hashes(whole, update)
    assert losses(killed) == losses(whole)
    assert not list(killed.rglob("*.tmp"))
    assert not list(killed.rglob("states-*"))


@pytest.mark.slow
@pytest.mark.parametrize("update", ["lora", "full", "economy"])
def test_a_kill_at_any_moment_changes_no_byte(
    update: Update, work: Callable[[Path, Update], Tuned], fork: Fork, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    work(whole, update)
    took = time.monotonic() - start
    draw = random.Random(update)
    lives = 0
    while True:
        child = fork(lambda: work(killed, update))
        gone = os.pidfd_open(child)
        select.select([gone], [], [], draw.uniform(0, took / 2) if lives < 25 else None)
        if select.select([gone], [], [], 0)[0]:
            os.close(gone)
            assert os.waitpid(child, 0)[1] == 0
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(gone)
        lives += 1
    assert hashes(killed, update) == hashes(whole, update)
    assert losses(killed) == losses(whole)
    for checkpoint in (killed / "checkpoints" / update).glob("step-*"):
        assert manifest_problem(checkpoint) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_start_ends_with_the_same_bytes(
    number: signal.Signals, work: Callable[..., Tuned], tmp_path: Path
) -> None:
    class Impatient(Screen):
        """Sends the signal while the first evaluation is being reported."""

        def line(self, text: str) -> None:
            if text.startswith("step 4:"):
                signal.raise_signal(number)

    work(tmp_path / "whole", "lora")
    with pytest.raises(Interrupted, match="stopped after step 4 of 10\nRun the same command"):
        work(tmp_path / "stopped", "lora", Impatient(quiet=True))
    assert (tmp_path / "stopped" / "checkpoints" / "lora" / "step-00000004").is_dir()
    work(tmp_path / "stopped", "lora")
    assert hashes(tmp_path / "stopped", "lora") == hashes(tmp_path / "whole", "lora")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_finished_update_is_loaded_and_not_trained_again(work: Callable[..., Tuned], tmp_path: Path) -> None:
    first = work(tmp_path / "run", "lora")
    before = hashes(tmp_path / "run", "lora")
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    again = work(tmp_path / "run", "lora", Screen(console=console))
    console.file.close()
    assert "lora was trained before" in console.export_text()
    assert again.train == first.train
    assert hashes(tmp_path / "run", "lora") == before


def test_what_is_handed_over_is_the_best_step_and_not_the_last(
    work: Callable[..., Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([3.0, 1.0, 2.0])
    real = module._validate

    def worse_at_the_end(update: Update, *rest: object) -> dict[str, float]:
        return {**real(update, *rest), "valid_loss": next(found)}  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_validate", worse_at_the_end)
    tuned = work(tmp_path / "run", "lora")
    assert (tuned.train["best_step"], tuned.train["steps"], tuned.train["valid_loss"]) == (7, 10, 1.0)
    assert read_json(tmp_path / "run" / "trained" / "lora.json")["train"]["best_step"] == 7


def test_training_stops_when_validation_no_longer_improves(
    work: Callable[..., Tuned], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rising = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr(
        module,
        "_validate",
        lambda *rest: {"valid_loss": next(rising), "valid_metric": 0.0},
    )
    object.__setattr__(recipe.train, "evaluations", 10)
    object.__setattr__(recipe.train, "patience", 2)
    tuned = work(tmp_path / "run", "lora")
    assert (tuned.train["best_step"], tuned.train["steps"]) == (1, 3)
