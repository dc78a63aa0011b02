"""Which folders become a model, which are refused and why, and what happens where rows cannot be packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tunesmith.data.pack import pack
from tunesmith.errors import ModelError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.adapters import load_adapter, save_adapter, save_model
from tunesmith.model.load import PLAIN_TEMPLATE, Model, load, load_vocabulary
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.many import Adapters
from tunesmith.model.merge import merge_files
from tunesmith.model.peft_layout import read_adapter
from tunesmith.model.sample import Sampling, sample
from tunesmith.model.score import score
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
PACKED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "gpt2": GPT2Config(**SMALL),
}
SOFT_CAPPED = Gemma2Config(
    **GROUPED, head_dim=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, initializer_range=0.3
)

SEEING = Gemma3Config(
    text_config={**GROUPED, "head_dim": 8, "max_position_embeddings": 512},
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
)


@pytest.fixture
def make(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedConfig], Path]:
    def made(config: PreTrainedConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return made


@pytest.fixture
def copied(tmp_path: Path, tiny_model_folder: Path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "base")


def refused(folder: Path, reason: str) -> str:
    with pytest.raises(ModelError, match=reason) as caught:
        load(str(folder), World())
    return str(caught.value)


def plain_log_probs(model: Model, examples: list[Example]) -> torch.Tensor:
    """Oracle: a fresh copy in transformers' own eager attention, one row at a time."""
    plain = AutoModelForCausalLM.from_pretrained(model.vocabulary.folder, attn_implementation="eager").eval()
    parts = []
    for example in examples:
        tokens = torch.from_numpy(example.tokens)
        with torch.no_grad():
            log_probs = torch.log_softmax(plain(tokens[None]).logits[0, :-1], -1)
        chosen = log_probs.gather(1, tokens[1:, None])[:, 0]
        parts.append(chosen[torch.from_numpy(example.weights)[1:] > 0])
    return torch.cat(parts)


@pytest.mark.parametrize("name", list(PACKED))
def test_common_architectures_pack(
    name: str, make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example]
) -> None:
    model = load(str(make(PACKED[name])), World())
    assert model.packs
    assert model.notes == ()
    (batch,) = pack(tiny_examples[:6], budget_tokens=4096)
    with torch.no_grad():
        found = score(model, batch).log_probs
    torch.testing.assert_close(found, plain_log_probs(model, tiny_examples[:6]), rtol=0, atol=1e-5)


def test_weights_in_products_are_counted_for_every_kind_of_linear_layer(
    make: Callable[[PreTrainedConfig], Path],
) -> None:
    model = load(str(make(PACKED["gpt2"])), World())
    assert model.product_parameters == 2 * 12 * 32 * 32 + 300 * 32


def test_an_architecture_without_linear_layers_is_told_to_tune_fully(make: Callable[[PreTrainedConfig], Path]) -> None:
    model = load(str(make(PACKED["gpt2"])), World())
    with pytest.raises(ModelError, match="no linear layer\n.*update: full"):
        attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)


def test_what_cannot_be_packed_is_scored_row_by_row_and_says_so(
    make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example]
) -> None:
    model = load(str(make(SOFT_CAPPED)), World())
    assert not model.packs
    assert "Gemma2ForCausalLM" in model.notes[0]
    assert "one example a row" in model.notes[0]
    rows = {row.id: row for row in tiny_examples[:4]}
    batches = pack(tiny_examples[:4], budget_tokens=1, share=False)
    assert sorted(batch.ids for batch in batches) == sorted((name,) for name in rows)
    for batch in batches:
        with torch.no_grad():
            found = score(model, batch).log_probs
        torch.testing.assert_close(found, plain_log_probs(model, [rows[batch.ids[0]]]), rtol=0, atol=1e-5)


def test_what_cannot_be_packed_answers_as_transformers_does(make: Callable[[PreTrainedConfig], Path]) -> None:
    model = load(str(make(SOFT_CAPPED)), World())
    plain = AutoModelForCausalLM.from_pretrained(model.vocabulary.folder, attn_implementation="eager").eval()
    prompts = [np.array([5, 6, 7]), np.array([9, 8])]
    for prompt, one in zip(prompts, sample(model, prompts, Sampling(max_new_tokens=5)), strict=True):
        ids = torch.from_numpy(prompt)[None]
        wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert one.tokens.tolist() == wanted[0, len(prompt) :].tolist()


def test_what_cannot_be_packed_still_learns(
    make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example], tmp_path: Path
) -> None:
    model = load(str(make(SOFT_CAPPED)), World())
    source = SftSteps(tiny_examples[:4], batch=4, epochs=6.0, budget_tokens=2048, world=World(), packs=model.packs)
    how = Optimization(learning_rate=1e-2)
    losses = [done.loss for done in fit(model, source, CrossEntropy(), how, tmp_path / "checkpoints", World())]
    assert losses[-1] < losses[0] - 0.5


def test_of_a_model_that_also_sees_the_language_model_is_taken(
    make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example]
) -> None:
    model = load(str(make(SEEING)), World())
    assert model.vocabulary.context_tokens == 512
    assert model.eos_ids == (2,)
    assert model.product_parameters == 2 * 32 * (4 * 8 * 2 + 2 * 8 * 2 + 3 * 48) + 300 * 32
    (batch,) = pack(tiny_examples[:3], budget_tokens=4096)
    with torch.no_grad():
        found = score(model, batch).log_probs
    torch.testing.assert_close(found, plain_log_probs(model, tiny_examples[:3]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_what_a_model_sees_with_has_no_adapters_in_training_in_peft_and_in_serving(
    make: Callable[[PreTrainedConfig], Path], tmp_path: Path
) -> None:
    base = str(make(SEEING))
    model = load(base, World())
    shape = LoraShape(rank=2, alpha=4.0)
    attach_lora(model.hf, shape, head=model.head)
    layers = set(lora_layers(model.hf))
    assert len(layers) == 2 * 7
    assert all("language_model" in name for name in layers)
    folder = save_adapter(model, shape, tmp_path / "adapter")
    load_adapter(load(base, World()), folder)
    Adapters(load(base, World())).add("one", read_adapter(folder))
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    adapted = [name for name, child in opened.named_modules() if isinstance(child, LoraLayer)]
    assert {name.removeprefix("base_model.model.") for name in adapted} == layers


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_also_sees_merges_to_what_peft_makes_of_base_and_adapter(
    stored: torch.dtype, make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example], tmp_path: Path
) -> None:
    base = make(SEEING)
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    model = load(str(base), World())
    shape = LoraShape(rank=2, alpha=4.0)
    attach_lora(model.hf, shape, head=model.head)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for layer in lora_layers(model.hf).values():
            layer.lora_b.normal_()
    adapter = save_adapter(model, shape, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(merge_files(base, adapter, tmp_path / "merged"))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    untuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert all(torch.equal(p, untuned.get_parameter(name)) for name, p in merged.named_parameters() if "vision" in name)
    tokens = torch.from_numpy(tiny_examples[0].tokens)[None]
    with torch.no_grad():
        plain = untuned(tokens).logits
        found, wanted = merged(tokens).logits, peft.PeftModel.from_pretrained(untuned, adapter)(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 0.1


def test_a_whole_model_that_also_sees_is_handed_over_with_how_it_sees(
    make: Callable[[PreTrainedConfig], Path], tmp_path: Path
) -> None:
    base = make(SEEING)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    out = save_model(load(str(base), World()), tmp_path / "model")
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_model_that_also_sees_learns(
    update: str, make: Callable[[PreTrainedConfig], Path], tiny_examples: list[Example], tmp_path: Path
) -> None:
    model = load(str(make(SEEING)), World())
    if update == "lora":
        attach_lora(model.hf, LoraShape(rank=2, alpha=4.0), head=model.head)
    seen = {name: p.detach().clone() for name, p in model.hf.named_parameters() if "vision" in name}
    source = SftSteps(tiny_examples[:4], batch=4, epochs=6.0, budget_tokens=2048, world=World(), packs=model.packs)
    how = Optimization(learning_rate=1e-2, weight_decay=0.1)
    losses = [done.loss for done in fit(model, source, CrossEntropy(), how, tmp_path / "checkpoints", World())]
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, seen[name]) for name, p in model.hf.named_parameters() if name in seen)


def test_a_base_without_a_chat_template_gets_the_plain_one_and_says_so(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    vocabulary = load_vocabulary(str(copied))
    assert vocabulary.tokenizer.chat_template == PLAIN_TEMPLATE
    assert "no chat template" in vocabulary.notes[0]


def test_every_end_of_turn_the_files_name_is_known(copied: Path) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load_vocabulary(str(copied)).eos_ids == (7, 2)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"text_config": {"auto_map": {"AutoConfig": "x.y"}}},
        {"trust_remote_code": True},
        {"text_config": [{"deep": {"trust_remote_code": True}}]},
        {"_attn_implementation": "someone/kernel"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_foreign_code_is_refused(change: dict[str, object], copied: Path) -> None:
    edit_config(copied, **change)
    assert str(copied / "config.json") in refused(copied, "can run foreign code")


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no .safetensors weights"),
        ("tokenizer.json", "the tokenizer is missing"),
    ],
)
def test_an_incomplete_folder_is_refused_by_what_is_missing(gone: str, reason: str, copied: Path) -> None:
    (copied / gone).unlink()
    assert str(copied) in refused(copied, reason)


def test_pickled_weights_are_never_opened(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    assert "never opened" in refused(copied, "no .safetensors weights")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_file_is_refused_with_the_folder(file: str, damage: str, copied: Path) -> None:
    data = (copied / file).read_bytes()
    (copied / file).write_bytes(data[: len(data) // 2] if damage == "cut" else b"\x00\xff" * 50)
    assert str(copied) in refused(copied, "cannot (be read|load the model)")


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    refused(copied, r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight")


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    edit_config(copied, intermediate_size=96)
    refused(copied, "cannot load the model")


@pytest.mark.parametrize("base", ["no/such/folder", "./nowhere", "absent.gguf", "weights.bin"])
def test_a_base_that_is_nowhere_is_refused_by_name(base: str) -> None:
    with pytest.raises(ModelError, match="no such"):
        load_vocabulary(base)
