"""What training hands over: a LoRA adapter in PEFT's layout, or a whole model folder. Other programs open both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ModelError
from ..folder import write_json, write_manifest, written_aside
from .load import Model
from .lora import LoraShape, attach_lora, lora_layers

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
        leaves = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(model.hf)})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model.vocabulary.folder),
            "r": shape.rank,
            "lora_alpha": shape.alpha,
            "lora_dropout": 0.0,
            "target_modules": leaves,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
        }
        write_json(folder / "adapter_config.json", config)
        model.tokenizer.save_pretrained(folder)
        beside(folder)
        write_manifest(folder)
    return out


def load_adapter(model: Model, folder: Path) -> LoraShape:
    """Attach an adapter written by save_adapter or by PEFT. Raises ModelError if it does not belong to the model."""
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
    shape = LoraShape(rank=config["r"], alpha=alpha, target=tuple(sorted({name.rsplit(".", 1)[-1] for name in names})))
    attach_lora(model.hf, shape, head=model.head)
    layers = lora_layers(model.hf)
    if set(layers) != names:
        odd = sorted(set(layers) ^ names)[0]
        raise ModelError(
            f"the adapter does not fit this base: {odd}", where=str(folder), fix="Use the base it was trained on."
        )
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"]
            if a.shape != layer.lora_a.shape or b.shape != layer.lora_b.shape:
                raise ModelError(
                    f"the adapter's {name} has another shape", where=str(folder), fix="Use the base it was trained on."
                )
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
    return shape


def save_model(model: Model, out: Path, beside: Beside = nothing) -> Path:
    """Write the whole model as a transformers folder: weights, config, generation config, tokenizer and template."""
    with written_aside(out) as folder:
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        beside(folder)
        write_manifest(folder)
    return out
