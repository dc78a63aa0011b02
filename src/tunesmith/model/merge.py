"""Adapter and base as one plain model folder, made from their files: what the next run starts from.

The sum W + s B A is taken in float32, as it was when the adapter was evaluated, and stored so. Or a base alone, its
matrices rounded to 8 bits (eight_bits.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ..errors import ModelError
from ..folder import MANIFEST, read_json, write_json, write_manifest, written_aside
from .eight_bits import RECORD, matrices, rounded, write_steps
from .peft_layout import read_adapter
from .stored import weight_files

# Beside the weights that transformers reads others may lie. They would stay untuned, and vLLM prefers Mistral's
# consolidated.safetensors, which it knows by params.json, and Mistral's tokenizers, which know no chat template.
_MISTRALS = ("params.json", "tekken.json", "tokenizer.model.v*")
_LEFT_OUT = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", *_MISTRALS, MANIFEST, RECORD)
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

    def summed(name: str, weight: Tensor) -> Tensor:
        layer = opened.get(_bare(name), "")
        if low_rank is None or layer not in left:
            return weight
        left.discard(layer)
        return _sum(weight, layer, *low_rank.pairs[layer], low_rank.shape.scale)

    _write_changed(base, folder, summed, dtype)
    if left == {"lm_head"}:
        what = "the adapter changes the output layer, which shares its weights with the embedding"
        raise ModelError(what, where=str(adapter), fix="Use the adapter beside its base: the two cannot be one model.")
    if left:
        fix = "Use the base that the adapter was trained on."
        raise ModelError(f"the base has no weight {min(left)}", where=str(adapter), fix=fix)


def write_rounded(base: Path, folder: Path) -> None:
    """Fill `folder` with a plain float16 `base`, the matrices of its linear layers rounded to 8 bits, and their steps.

    Raises ModelError where there is no such matrix, or a number is too large for float16.
    """
    opened = {_bare(name): name for name in matrices(base)}
    steps: dict[str, Tensor] = {}
    numbers = 0

    def changed(name: str, weight: Tensor) -> Tensor:
        nonlocal numbers
        if not bool(weight.half().isfinite().all()):
            what = f"{name} holds numbers that float16 does not"
            raise ModelError(what, where=str(base), fix="Keep this base as it is stored (lora.weights: stored).")
        layer = opened.get(_bare(name))
        if layer is None:
            return weight
        weight, steps[layer] = rounded(weight)
        numbers += weight.numel()
        return weight

    _write_changed(base, folder, changed, torch.float16)
    if not steps:
        raise ModelError("there is no linear layer to round", where=str(base), fix="Use this base as it is.")
    write_steps(folder, steps, numbers)


def _write_changed(base: Path, folder: Path, change: Callable[[str, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Copy what transformers reads of `base`; `change` is given each tensor of numbers, by its layer's name."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not any(map(path.match, _LEFT_OUT)):
            shutil.copyfile(path, folder / path.name)
    if (templates := base / CHAT_TEMPLATE_DIR).is_dir():  # such as one for turns with tools
        shutil.copytree(templates, folder / CHAT_TEMPLATE_DIR)
    for path in weight_files(base):
        tensors = load_file(path)
        for name in tensors:
            if tensors[name].is_floating_point():
                tensors[name] = change(name.removesuffix(".weight"), tensors[name]).to(dtype)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
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
