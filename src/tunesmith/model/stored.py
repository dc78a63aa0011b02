"""How the weights of a base are kept in memory: as they are multiplied, or as their files store them.

Numbers in bfloat16 and float16 are float32 numbers with zeros at the end, so on a CPU a frozen matrix may stay as it is
until it is multiplied (linear.py), with the same results. That takes half the memory and longer, so it is done where
float32 would leave too little room for training. A base that was rounded (eight_bits.py) takes a quarter, and on a GPU
half.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from ..errors import ModelError
from ..memory import available_bytes
from ..recipe import Weights
from ..types import Derived
from ..world import World
from .eight_bits import rounded_numbers

COMFORTABLE = 0.5  # share of the memory that weights may take as they are multiplied
EIGHT_BITS = "8 bits"
FLOAT32 = Derived(key="lora.weights", value="float32", reason="the memory has room for it")
ON_GPU = Derived(key="lora.weights", value="bfloat16", reason="the type that a GPU multiplies")
_NARROW = {"BF16": "bfloat16", "F16": "float16"}


class _Files(NamedTuple):
    """How many numbers a base has, how many of them were rounded, and what all are stored as."""

    numbers: int
    rounded: int
    stored: str

    def bytes_as_stored(self, sharing: int) -> int:
        """16 bits are mapped from their files, so that `sharing` processes share them; 8 bits are each one's own."""
        return 2 * (self.numbers - self.rounded) + self.rounded * sharing


def kept_as(folder: Path, wanted: Weights, world: World) -> Derived:
    """The name of the type in which frozen weights are kept, and why. Raises ModelError where they do not fit."""
    files, on_gpu = _in_files(folder), world.device.type == "cuda"
    if on_gpu and files.stored != EIGHT_BITS:
        return ON_GPU
    usual, usual_bytes = (ON_GPU, 2) if on_gpu else (FLOAT32, 4)
    room, whole = available_bytes(world.device), usual_bytes * files.numbers * world.sharing
    as_stored = files.bytes_as_stored(world.sharing)
    spare = wanted == "stored" or (wanted == "auto" and whole > COMFORTABLE * room)
    kept = files.stored if spare else str(usual.value)
    need = whole if kept == usual.value else as_stored
    if need > room:
        raise ModelError(
            f"the weights take {need / 1e9:.1f} GB in {kept}, the machine has {room / 1e9:.1f} GB",
            where=str(folder),
            fix=_what_fits(files, kept, as_stored, room),
        )
    if wanted == "auto" and not spare:
        return usual
    exactly = "" if kept == EIGHT_BITS else ", exactly"
    why = f"{usual.value} would take {whole / 1e9:.1f} of {room / 1e9:.1f} GB; widened as they are multiplied{exactly}"
    return Derived(
        key=usual.key,
        value=kept,
        reason=why if wanted == "auto" else "as lora.weights asks, or full fine-tuning needs",
    )


def _what_fits(files: _Files, kept: str, as_stored: int, room: int) -> str:
    if kept != files.stored and as_stored < room:
        return f"With update: lora they can stay in {files.stored}, {as_stored / 1e9:.1f} GB (lora.weights: stored)."
    or_round = ", or round this one to 8 bits where there is room (tunesmith round)" if not files.rounded else ""
    return f"Choose a smaller base{or_round}."


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; others beside them are for other programs."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))


def _in_files(folder: Path) -> _Files:
    """What is stored, in float32 unless all numbers are stored in the same shorter type."""
    numbers, types = 0, set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found = file.get_slice(name)
                numbers += torch.Size(found.get_shape()).numel()
                types.add(found.get_dtype())
    if rounded := rounded_numbers(folder):
        return _Files(numbers, rounded, EIGHT_BITS)
    return _Files(numbers, 0, _NARROW.get(types.pop(), "float32") if len(types) == 1 else "float32")
