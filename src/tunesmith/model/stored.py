"""How the weights of a base are kept in memory on a CPU: in float32, or as their files store them.

Numbers in bfloat16 and float16 are float32 numbers with zeros at the end, so a frozen matrix may stay as it is until it
is multiplied (linear.py), with the same results. It takes half the memory and longer; so it stays where float32 would
leave too little room for training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import ModelError
from ..memory import available_bytes
from ..recipe import Weights
from ..types import Derived
from ..world import World

COMFORTABLE = 0.5  # share of the memory that float32 weights may take
FLOAT32 = Derived(key="lora.weights", value="float32", reason="the memory has room for it")
_NARROW = {"BF16": "bfloat16", "F16": "float16"}


def kept_as(folder: Path, wanted: Weights, world: World) -> Derived:
    """The name of the type in which frozen weights are kept, and why. Raises ModelError where they do not fit."""
    numbers, stored = _in_files(folder)
    room, float32 = available_bytes(world.device), 4 * numbers * world.sharing
    spare = wanted == "stored" or (wanted == "auto" and float32 > COMFORTABLE * room)
    kept = stored if spare else "float32"
    need = float32 if kept == "float32" else 2 * numbers  # mapped from their files: processes share them
    if need > room:
        halved = kept != stored and 2 * numbers < room
        raise ModelError(
            f"the weights take {need / 1e9:.1f} GB in {kept}, the machine has {room / 1e9:.1f} GB",
            where=str(folder),
            fix=f"With update: lora they can stay in {stored}, {2 * numbers / 1e9:.1f} GB (lora.weights: stored)."
            if halved
            else "Choose a smaller base.",
        )
    if wanted == "auto" and not spare:
        return FLOAT32
    why = f"float32 would take {float32 / 1e9:.1f} of {room / 1e9:.1f} GB; widened as they are multiplied, exactly"
    return Derived(
        key=FLOAT32.key,
        value=kept,
        reason=why if wanted == "auto" else "as lora.weights asks, or full fine-tuning needs",
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads weights from; others beside them are for other programs."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))


def _in_files(folder: Path) -> tuple[int, str]:
    """How many numbers there are, and their type: float32 unless all are stored in the same shorter one."""
    numbers, types = 0, set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found = file.get_slice(name)
                numbers += torch.Size(found.get_shape()).numel()
                types.add(found.get_dtype())
    return numbers, _NARROW.get(types.pop(), "float32") if len(types) == 1 else "float32"
