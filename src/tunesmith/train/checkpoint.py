"""Checkpoints: safetensors, JSON and a manifest of hashes, written aside and renamed. Never pickle.

What a step needs besides is a function of its number (data order, learning rate), so a resumed run gives the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..folder import manifest_problem, read_json, storage_errors, write_json, write_manifest, written_aside

KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint read back: finished steps, what the loop had counted by then, newer ones passed over and why."""

    step: int
    state: Mapping[str, float]
    damaged: Mapping[str, str]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_weights(module: nn.Module, path: Path) -> None:
    """The trained parameters in one safetensors file."""
    with storage_errors(path):
        save_file({name: p.detach().contiguous().cpu() for name, p in trainable(module).items()}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Put saved parameters back, in place."""
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in trainable(module).items():
            parameter.copy_(saved[name])


def save_checkpoint(
    root: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, float]
) -> Path:
    """Write `root/step-N` whole or not at all, and forget all but the newest two. Raises FolderError."""
    target = root / f"step-{step:08d}"
    with written_aside(target) as folder:
        save_weights(module, folder / "weights.safetensors")
        save_file(_optimizer_tensors(module, optimizer), folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": step, **state})
        write_manifest(folder)
    for old in _steps(root)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def resume(root: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Saved | None:
    """Load the newest checkpoint whose hashes are right into module and optimizer; None if there is none."""
    damaged: dict[str, str] = {}
    for path in reversed(_steps(root)):
        problem = manifest_problem(path)
        if problem:
            damaged[path.name] = problem
            continue
        load_weights(module, path / "weights.safetensors")
        _restore(module, optimizer, load_file(path / "optimizer.safetensors"))
        state = read_json(path / "state.json")
        return Saved(step=int(state.pop("step")), state=state, damaged=damaged)
    return Saved(step=0, state={}, damaged=damaged) if damaged else None


def tidy(root: Path, damaged: Sequence[str]) -> None:
    """Set damaged checkpoints aside as `damaged-step-N`, so that they count no more; delete what a kill left half."""
    for name in damaged:
        aside = root / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (root / name).rename(aside)
    for left in root.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in trainable(module).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}:{key}"] = value.detach().contiguous().cpu()
    return tensors


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable(module).items():
        keys = [key.rsplit(":", 1)[1] for key in tensors if key.rsplit(":", 1)[0] == name]
        optimizer.state[parameter] = {key: tensors[f"{name}:{key}"].to(parameter.device) for key in keys}
