"""Adapter and base as one folder: the weights that transformers reads, and none that would pass for them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tunesmith.model.adapters import load_adapter
from tunesmith.model.load import load, load_vocabulary
from tunesmith.model.lora import lora_layers
from tunesmith.model.merge import merge_files
from tunesmith.world import World

MISTRALS = ("params.json", "tekken.json", "tokenizer.model.v3", "tokenizer.model.v7m1")


def test_a_template_for_tools_beside_the_usual_one_comes_along(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, finished_run: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    merged = merge_files(base, finished_run.with_name("run") / "adapter", tmp_path / "merged")
    assert load_vocabulary(str(merged)).tokenizer.chat_template == tokenizer.chat_template


def test_weights_and_tokenizers_of_the_base_for_other_programs_are_left_out(
    tiny_model_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    for name in ("consolidated.00.pth", "pytorch_model.bin", "model-q8_0.gguf", "LICENSE", *MISTRALS):
        (base / name).write_text("{}")
    adapter = finished_run.with_name("run") / "adapter"
    merged = merge_files(base, adapter, tmp_path / "merged")
    others = {path.name for path in tiny_model_folder.iterdir() if path.name != "manifest.json"}
    assert {path.name for path in merged.iterdir()} == {*others, "LICENSE", "manifest.json"}
    model = load(str(base), World())
    load_adapter(model, adapter)
    weights = load_file(merged / "model.safetensors")
    for name, layer in lora_layers(model.hf).items():
        torch.testing.assert_close(weights[f"{name}.weight"], layer.whole)
