"""An adapter as it lies in a folder: adapter_config.json and adapter_model.safetensors, as PEFT has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError
from .lora import LoraShape, block_of

PREFIX = "base_model.model."
_BEYOND_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as it lies in a folder: its shape, and A [rank in], B [out rank] of each layer by name."""

    shape: LoraShape
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    folder: Path

    def check(self, layers: Mapping[str, nn.Linear]) -> None:
        """Raise ModelError unless the adapter is one for these layers and no others."""
        fix = "Use the base it was trained on."
        if set(layers) != set(self.pairs):
            odd = min(set(layers) ^ set(self.pairs))
            raise ModelError(f"the adapter does not fit this base: {odd}", where=str(self.folder), fix=fix)
        for name, (a, b) in self.pairs.items():
            rank, layer = self.shape.rank, layers[name]
            if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank):
                raise ModelError(f"the adapter's {name} has another shape", where=str(self.folder), fix=fix)


def read_adapter(folder: Path) -> Adapter:
    """What save_adapter or PEFT wrote. Raises ModelError if it cannot be read or is more than a plain adapter."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"cannot read the adapter: {error}", where=str(folder), fix="Give a folder in PEFT's layout."
        ) from None
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, _BEYOND_PLAIN)):
        raise ModelError(
            "only plain LoRA adapters are supported", where=str(folder), fix="Merge the adapter with PEFT first."
        )
    names = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    alpha *= rank**0.5 if config.get("use_rslora") else 1.0  # there it is divided by the root of the rank
    leaves = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    lowest = min((block_of(name) or 0 for name in names), default=0)
    shape = LoraShape(rank=rank, alpha=alpha, target=leaves, lowest=lowest)
    try:
        sides = {name: [tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB"] for name in names}
    except KeyError as error:
        raise ModelError(f"the adapter lacks {error}", where=str(folder), fix="Fetch the adapter again.") from None
    return Adapter(shape=shape, pairs={name: (a, b) for name, (a, b) in sides.items()}, folder=folder)
