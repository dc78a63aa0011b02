"""Ten steps are five, a stop and five more, bit for bit; a damaged checkpoint is set aside, never trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.folder import manifest_problem
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.linear import Precision
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.train.checkpoint import KEPT, trainable
from tunesmith.train.fit import StepDone, fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World

EVERY_STEP = Optimization(learning_rate=5e-3, checkpoint_seconds=0.0)
AT_THE_END = Optimization(learning_rate=5e-3)
Train = Callable[..., tuple[list[StepDone], dict[str, Tensor]]]


@pytest.fixture
def train(tiny_model_folder: Path, tiny_examples: list[Example], update: str) -> Train:
    """Train afresh, or on from the checkpoints in `folder`, until `until`; gives the steps and the weights."""

    def trained(folder: Path, until: int = 10, how: Optimization = EVERY_STEP) -> tuple[list[StepDone], dict]:
        model = load(str(tiny_model_folder), World())
        if update == "lora":
            attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)
        source = SftSteps(tiny_examples, batch=8, epochs=1.0, budget_tokens=200, world=World(), max_steps=10)
        done = []
        for one in fit(model, source, CrossEntropy(), how, folder, World(), stop=lambda: False):
            done.append(one)
            if one.step == until + 1:  # the step after `until` is lost, as when a process dies in it
                break
        return done, weights(model)

    return trained


@pytest.fixture(params=["lora", "full"])
def update(request: pytest.FixtureRequest) -> str:
    return request.param


def weights(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model.hf).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files that must be the same after a resumed run; state.json holds seconds."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_five_and_five_steps_are_ten_bit_for_bit(train: Train, tmp_path: Path, precision: Precision) -> None:
    at_the_end, every_step = (replace(how, precision=precision) for how in (AT_THE_END, EVERY_STEP))
    whole, at_once = train(tmp_path / "whole", how=at_the_end)
    train(tmp_path / "parts", until=5, how=every_step)
    rest, in_parts = train(tmp_path / "parts", how=every_step)
    assert [one.step for one in rest] == [6, 7, 8, 9, 10]
    assert rest[0].resumed == "resumed after step 5"
    assert rest[1].resumed == ""
    assert same(at_once, in_parts)
    assert [one.loss for one in whole[5:]] == [one.loss for one in rest]
    assert [one.tokens for one in whole[5:]] == [one.tokens for one in rest]
    last = "step-00000010"
    assert bytes_of(tmp_path / "whole" / last) == bytes_of(tmp_path / "parts" / last)


def test_stopping_after_every_single_step_changes_no_bit(train: Train, tmp_path: Path) -> None:
    _, at_once = train(tmp_path / "whole", how=AT_THE_END)
    for until in range(1, 10):
        train(tmp_path / "parts", until=until)
    assert same(at_once, train(tmp_path / "parts")[1])


def test_only_the_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    train(tmp_path, until=6)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]
    assert KEPT == 2


def test_a_finished_run_takes_no_more_steps_and_has_its_weights(train: Train, tmp_path: Path) -> None:
    _, first = train(tmp_path)
    done, again = train(tmp_path)
    assert done == []
    assert same(first, again)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("update", ["lora"], indirect=True)
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", list(DAMAGE))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    how: str, file: str, train: Train, tmp_path: Path
) -> None:
    train(tmp_path, until=3)
    if how == "flipped bit" and file == "manifest.json":
        (tmp_path / "step-00000003" / file).write_text("{}")
    else:
        DAMAGE[how](tmp_path / "step-00000003" / file)
    rest, _ = train(tmp_path, until=3)
    assert rest[0].resumed == "resumed after step 2"
    assert rest[0].damaged[0].startswith(f"step-00000003: {file} ")
    assert names(tmp_path) == ["damaged-step-00000003", "step-00000002", "step-00000003"]
    assert manifest_problem(tmp_path / "step-00000003") == ""


def test_the_run_after_a_damaged_checkpoint_ends_with_the_same_bits(train: Train, tmp_path: Path) -> None:
    _, at_once = train(tmp_path / "whole", how=AT_THE_END)
    train(tmp_path / "parts", until=5)
    flip(tmp_path / "parts" / "step-00000005" / "optimizer.safetensors")
    assert same(at_once, train(tmp_path / "parts")[1])


def test_damaged_checkpoints_never_push_out_good_ones(train: Train, tmp_path: Path) -> None:
    train(tmp_path, until=8)
    for number in (7, 8):
        flip(tmp_path / f"step-0000000{number}" / "weights.safetensors")
    done, _ = train(tmp_path, until=2)
    assert [one.step for one in done] == [1, 2, 3]
    assert len(done[0].damaged) == 2
    assert done[0].resumed == ""
    assert {"step-00000001", "step-00000002"} <= set(names(tmp_path))


def test_what_a_kill_left_half_written_is_removed(train: Train, tmp_path: Path) -> None:
    train(tmp_path, until=2)
    (tmp_path / ".step-00000003.77-abc.tmp").mkdir()
    (tmp_path / ".step-00000003.77-abc.tmp" / "weights.safetensors").write_bytes(b"half")
    done, _ = train(tmp_path, until=3)
    assert done[0].step == 3
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
