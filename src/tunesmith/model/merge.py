"""Adapter and base as one plain model folder, made from their files: what the next run starts from.

The sum W + s B A is taken in float32, as it was when the adapter was evaluated, and stored so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ModelError
from ..folder import write_manifest, written_aside

_PREFIX = "base_model.model."


def merge_files(base: Path, adapter: Path, out: Path) -> Path:
    """Write `base` with `adapter` added as the transformers folder `out`. Raises ModelError where they do not fit."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        low_rank = load_file(adapter / "adapter_model.safetensors")
        scale = float(config["lora_alpha"]) / float(config["r"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fix = "Finish the run that makes it with `tunesmith run`."
        raise ModelError(f"cannot read the adapter: {error}", where=str(adapter), fix=fix) from None
    left = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in low_rank}
    with written_aside(out) as folder:
        for path in sorted(base.iterdir()):
            if path.suffix != ".safetensors":
                if path.is_file() and path.name != "manifest.json":
                    shutil.copyfile(path, folder / path.name)
                continue
            tensors = load_file(path)
            for name in [name for name in tensors if name.removesuffix(".weight") in left]:
                tensors[name] = _sum(tensors[name], name.removesuffix(".weight"), low_rank, scale)
                left.discard(name.removesuffix(".weight"))
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        if left:
            fix = "Use the base that the adapter was trained on."
            raise ModelError(f"the base has no weight {min(left)}", where=str(adapter), fix=fix)
        write_manifest(folder)
    return out


def _sum(weight: Tensor, name: str, low_rank: dict[str, Tensor], scale: float) -> Tensor:
    a, b = (low_rank[f"{_PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
    return torch.addmm(weight.float(), b, a, alpha=scale).contiguous()
