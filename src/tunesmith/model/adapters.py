"""What training hands over: a LoRA adapter in PEFT's layout, or a whole model folder. Other programs open both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ModelError
from ..folder import read_json, write_json, write_manifest, written_aside
from .load import Model, without_progress_bars
from .lora import LoraShape, attach_lora, block_of, language_model, lora_layers
from .peft_layout import PREFIX, read_adapter

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
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().float().contiguous().cpu()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().float().contiguous().cpu()
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
        for path in model.vocabulary.folder.glob("*processor_config.json"):  # of models that also see or hear
            shutil.copyfile(path, folder / path.name)
        write_generation(folder, model.eos_ids)
        beside(folder)
        write_manifest(folder)
    return out


def write_generation(folder: Path, eos_ids: Sequence[int]) -> None:
    """generation_config.json of a folder: all tokens that end an answer, and no other than token ids of its makers'.

    Answers are judged without the makers' temperature and penalties, which other programs would use.
    """
    path = folder / "generation_config.json"
    found = read_json(path) if path.is_file() else {}
    kept = {key: value for key, value in found.items() if key.endswith("_token_id")}
    write_json(path, {**kept, "eos_token_id": list(eos_ids)})
