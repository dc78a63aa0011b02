"""`tunesmith round`: a base in 8 bits a number as a folder of its own, and what rounding did to it, measured.

A run that starts from the folder compares what it tuned with the rounded base, as any run does with the base that it is
given. What the rounding itself cost is measured here, once, and lies in the folder as `rounded.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FolderError, ModelError
from ..evaluate.forgetting import general_ability
from ..evaluate.stats import estimate, paired
from ..folder import read_json, write_json, write_manifest, written_aside
from ..model.eight_bits import RECORD, rounded_numbers
from ..model.load import check_folder, load, resolve
from ..model.merge import write_rounded
from ..model.once import made_once
from ..screen import Screen
from ..world import World


def round_base(base: str, out: Path, screen: Screen) -> dict[str, Any]:
    """Write `base`, rounded, as the folder `out`, and return what is said in it. Raises FolderError and ModelError."""
    if out.exists():
        raise FolderError("exists already", where=str(out), fix="Give another folder as --out, or delete this one.")
    source = resolve(base)
    check_folder(source)
    if rounded_numbers(source):
        raise ModelError("this base is rounded already", where=base, fix="Name it as base: in a recipe.")
    made_once(out, lambda out: _write(source, base, out, screen))
    record = read_json(out / RECORD)
    _show(record["general_loss"], out, screen)
    return record


def _write(source: Path, base: str, out: Path, screen: Screen) -> None:
    with written_aside(out) as folder:
        screen.stage("Rounding", f"{base}, 8 bits a number")
        write_rounded(source, folder)
        screen.stage("Measuring", "loss on general prose, before and after")
        before, after = (_general_losses(path, screen) for path in (source, folder))
        losses = {"before": estimate(before), "after": estimate(after), "change": paired(after, before)}
        record = {
            "schema": 1,
            "base": base,
            "numbers_in_8_bits": rounded_numbers(folder),
            "general_loss": {name: asdict(found) for name, found in losses.items()},
        }
        write_json(folder / RECORD, record)
        write_manifest(folder)


def _general_losses(folder: Path, screen: Screen) -> np.ndarray:
    """Nats a token of each general text."""
    model = load(str(folder), World())
    screen.line(f"{model.parameters:,} numbers, kept in {model.weights.value}")
    return general_ability(model, ()).losses


def _show(losses: Mapping[str, Mapping[str, float]], out: Path, screen: Screen) -> None:
    rows = []
    for name, found in losses.items():
        sign = "+" if name == "change" else ""
        value, low, high = (f"{found[key]:{sign}.4f}" for key in ("value", "low", "high"))
        rows.append([name, value, f"{low} to {high}"])
    screen.table(["general loss", "nats a token", "95%"], rows)
    if losses["change"]["low"] > 0:
        screen.warn("rounding made the base worse; how much that is for your task, a run from it shows")
    screen.line(f"wrote {out}; base: {out} in a recipe trains over it, in 8 bits with lora.weights: stored")
