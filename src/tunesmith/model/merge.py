"""Adapter and base as one plain model folder, made from their files: what the next run starts from.

The sum W + s B A is taken in float32, as it was when the adapter was evaluated, and stored so.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ..errors import ModelError
from ..folder import MANIFEST, read_json, write_json, write_manifest, written_aside
from .peft_layout import read_adapter
from .stored import weight_files

# Beside the weights that transformers reads others may lie. They would stay untuned, and vLLM prefers Mistral's
# consolidated.safetensors, which it knows by params.json, and Mistral's tokenizers, which know no chat template.
_MISTRALS = ("params.json", "tekken.json", "tokenizer.model.v*")
_LEFT_OUT = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", *_MISTRALS, MANIFEST)
# Parts of names that files and the opened model may have in another order, or lack: a Gemma 3 that sees is stored as
# language_model.model.layers... and opened as model.language_model.layers...
_WRAPPERS = {"model", "language_model"}


def merge_files(base: Path, adapter: Path, out: Path) -> Path:
    """Write `base` with `adapter` added as the transformers folder `out`. Raises ModelError where they do not fit."""
    with written_aside(out) as folder:
        write_plain(base, adapter, folder)
        write_manifest(folder)
    return out


def write_plain(base: Path, adapter: Path | None, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Fill `folder` with the files of `base` that transformers reads, its weights plus `adapter` stored as `dtype`."""
    low_rank = read_adapter(adapter) if adapter else None
    left = set(low_rank.pairs) if low_rank else set()
    opened = {_bare(name): name for name in left}  # as the model calls its layers
    for path in sorted(base.iterdir()):
        if path.is_file() and not any(map(path.match, _LEFT_OUT)):
            shutil.copyfile(path, folder / path.name)
    if (templates := base / CHAT_TEMPLATE_DIR).is_dir():  # such as one for turns with tools
        shutil.copytree(templates, folder / CHAT_TEMPLATE_DIR)
    for path in weight_files(base):
        tensors = load_file(path)
        for name in tensors:
            layer = opened.get(_bare(name.removesuffix(".weight")), "")
            if low_rank and layer in left:
                tensors[name] = _sum(tensors[name], layer, *low_rank.pairs[layer], low_rank.shape.scale)
                left.discard(layer)
            if tensors[name].is_floating_point():
                tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if left == {"lm_head"}:
        what = "the adapter changes the output layer, which shares its weights with the embedding"
        raise ModelError(what, where=str(adapter), fix="Use the adapter beside its base: the two cannot be one model.")
    if left:
        fix = "Use the base that the adapter was trained on."
        raise ModelError(f"the base has no weight {min(left)}", where=str(adapter), fix=fix)
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)  # the older name; whoever opens the folder takes the weights as they are stored
    write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})


def _bare(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _WRAPPERS)


def _sum(weight: Tensor, name: str, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if weight.shape != (b.shape[0], a.shape[1]):
        fix = "Use the base that the adapter was trained on."
        raise ModelError(f"the adapter does not fit this base: {name} has another shape", where=name, fix=fix)
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).contiguous()
