"""What training hands over: a LoRA adapter in PEFT's layout, or a whole model folder. Other programs open both."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ModelError
from ..folder import write_json, write_manifest, written_aside
from .load import Model, without_progress_bars
from .lora import LoraShape, attach_lora, block_of, language_model, lora_layers

_PREFIX = "base_model.model."
_BEYOND_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


Beside = Callable[[Path], None]


def nothing(folder: Path) -> None:
    """Nothing beside the model."""


def save_adapter(model: Model, shape: LoraShape, out: Path, beside: Beside = nothing) -> Path:
    """Write the adapter as PEFT reads it (adapter_config.json, adapter_model.safetensors), with the tokenizer.

    `beside` may write more into the folder before it takes its place.
    """
    with written_aside(out) as folder:
        tensors = {}
        for name, layer in lora_layers(model.hf).items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().float().contiguous().cpu()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().float().contiguous().cpu()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        names = sorted(lora_layers(model.hf))
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model.vocabulary.folder),
            "r": shape.rank,
            "lora_alpha": shape.alpha,
            "lora_dropout": 0.0,
            # What sees or hears beside the language model may have layers of the same names.
            "target_modules": leaves if language_model(model.hf) is model.body else names,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
        }
        if shape.lowest:
            config["layers_to_transform"] = sorted(
                {block for name in lora_layers(model.hf) if (block := block_of(name)) is not None}
            )
        write_json(folder / "adapter_config.json", config)
        model.tokenizer.save_pretrained(folder)
        beside(folder)
        write_manifest(folder)
    return out


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
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"cannot read the adapter: {error}", where=str(folder), fix="Give a folder in PEFT's layout."
        ) from None
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, _BEYOND_PLAIN)):
        raise ModelError(
            "only plain LoRA adapters are supported", where=str(folder), fix="Merge the adapter with PEFT first."
        )
    names = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    scale_rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    alpha = config["lora_alpha"] / scale_rank * config["r"]
    leaves = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    lowest = min((block_of(name) or 0 for name in names), default=0)
    shape = LoraShape(rank=config["r"], alpha=alpha, target=leaves, lowest=lowest)
    try:
        sides = {name: [tensors[f"{_PREFIX}{name}.lora_{side}.weight"] for side in "AB"] for name in names}
    except KeyError as error:
        raise ModelError(f"the adapter lacks {error}", where=str(folder), fix="Fetch the adapter again.") from None
    return Adapter(shape=shape, pairs={name: (a, b) for name, (a, b) in sides.items()}, folder=folder)


def load_adapter(model: Model, folder: Path) -> LoraShape:
    """Attach an adapter written by save_adapter or by PEFT. Raises ModelError if it does not belong to the model."""
    adapter = read_adapter(folder)
    if any(child is model.head for name, child in model.hf.named_modules() if name in adapter.pairs):
        what = "the adapter changes the output layer, where Tunesmith takes none"
        raise ModelError(what, where=str(folder), fix="Merge it with PEFT, and use the merged model.")
    attach_lora(model.hf, adapter.shape, head=model.head)
    layers = lora_layers(model.hf)
    adapter.check(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = adapter.pairs[name]
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
    return adapter.shape


def save_model(model: Model, out: Path, beside: Beside = nothing) -> Path:
    """Write the whole model as a transformers folder: weights, config, generation config, tokenizer and template."""
    with written_aside(out) as folder, without_progress_bars():
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        beside(folder)
        write_manifest(folder)
    return out
