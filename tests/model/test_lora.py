"""An adapter changes what it should, is read by peft as it was written, and belongs to its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunesmith.data.pack import pack_one
from tunesmith.errors import ModelError
from tunesmith.model.adapters import load_adapter, save_adapter, save_model
from tunesmith.model.attention import PackedAttention
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora, lora_layers
from tunesmith.model.merge import merge_files
from tunesmith.model.sample import Sampling, sample
from tunesmith.model.score import score
from tunesmith.tensors import Layout
from tunesmith.types import Example
from tunesmith.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
SHAPE = LoraShape(rank=4, alpha=8.0)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def logits(model: Model) -> Tensor:
    tokens = torch.arange(3, 20)
    attend = PackedAttention(Layout(lengths=(17,), parents=(-1,)))
    out = model.body(input_ids=tokens[None], position_ids=torch.arange(17)[None], use_cache=False, attend=attend)
    return out.last_hidden_state[0] @ model.head_weight.T


@torch.no_grad()
def plain_logits(model: nn.Module) -> Tensor:
    return model(torch.arange(3, 20)[None], use_cache=False).logits[0]


def shake(model: Model) -> None:
    """Give every B other values than its zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model.hf).values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.1)


@pytest.fixture
def adapted(fresh_model: Model) -> Model:
    attach_lora(fresh_model.hf, SHAPE, head=fresh_model.head)
    shake(fresh_model)
    return fresh_model


def test_a_new_adapter_leaves_the_base_as_it_was(fresh_model: Model, tiny_model: Model) -> None:
    attach_lora(fresh_model.hf, SHAPE, head=fresh_model.head)
    assert torch.equal(logits(fresh_model), logits(tiny_model))


def test_only_the_adapter_is_trained_and_the_head_has_none(fresh_model: Model) -> None:
    count = attach_lora(fresh_model.hf, SHAPE, head=fresh_model.head)
    trained = {name: p for name, p in fresh_model.hf.named_parameters() if p.requires_grad}
    assert count == sum(p.numel() for p in trained.values())
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_a", "lora_b"}
    assert {name.split(".")[-2] for name in trained} == set(LINEAR)
    assert len(lora_layers(fresh_model.hf)) == 14


def test_where_an_adapter_starts_depends_on_the_seed_and_the_layer_only(tiny_model_folder: Path) -> None:
    first, again, other = (load(str(tiny_model_folder), World()) for _ in range(3))
    for model, target, seed in ((first, None, 0), (again, ("q_proj",), 0), (other, ("q_proj",), 1)):
        attach_lora(model.hf, LoraShape(rank=4, alpha=8.0, target=target, seed=seed), head=model.head)
    for name, layer in lora_layers(again.hf).items():
        assert torch.equal(layer.lora_a, lora_layers(first.hf)[name].lora_a)
        assert not torch.equal(layer.lora_a, lora_layers(other.hf)[name].lora_a)


def test_switching_adapters_off_gives_the_base_bit_for_bit(adapted: Model, tiny_model: Model) -> None:
    tuned = logits(adapted)
    with adapters_off(adapted.hf):
        assert torch.equal(logits(adapted), logits(tiny_model))
    assert torch.equal(logits(adapted), tuned)
    assert not torch.allclose(tuned, logits(tiny_model), atol=1e-3)


def test_adapters_come_back_on_after_an_error(adapted: Model) -> None:
    with pytest.raises(KeyError), adapters_off(adapted.hf):
        raise KeyError
    assert all(layer.enabled for layer in lora_layers(adapted.hf).values())


def test_adapter_and_base_merged_answer_as_they_do(adapted: Model, tiny_model_folder: Path, tmp_path: Path) -> None:
    before = logits(adapted)
    merge_files(tiny_model_folder, save_adapter(adapted, SHAPE, tmp_path / "adapter"), tmp_path / "merged")
    torch.testing.assert_close(logits(load(str(tmp_path / "merged"), World())), before, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_logits(plain), before, rtol=0, atol=1e-5)


def test_peft_reads_what_we_write(adapted: Model, tiny_model_folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted, SHAPE, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(plain_logits(theirs), logits(adapted), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain_logits(theirs.merge_and_unload()), logits(adapted), rtol=0, atol=1e-5)


def test_what_we_write_we_read_bit_for_bit(adapted: Model, tiny_model_folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted, SHAPE, tmp_path / "adapter")
    again = load(str(tiny_model_folder), World())
    shape = load_adapter(again, tmp_path / "adapter")
    assert (shape.rank, shape.alpha) == (SHAPE.rank, SHAPE.alpha)
    assert torch.equal(logits(again), logits(adapted))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", [LINEAR, ["q_proj", "v_proj"]], ids=["all", "two"])
def test_we_read_what_peft_writes(rslora: bool, target: list[str], fresh_model: Model, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(fresh_model.vocabulary.folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=target, use_rslora=rslora, task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    load_adapter(fresh_model, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh_model), plain_logits(theirs), rtol=0, atol=1e-5)


def test_an_adapter_of_the_upper_blocks_goes_to_peft_and_comes_back(
    fresh_model: Model, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shape = LoraShape(rank=4, alpha=8.0, lowest=1)
    attach_lora(fresh_model.hf, shape, head=fresh_model.head)
    assert {name.split(".")[2] for name in lora_layers(fresh_model.hf)} == {"1"}
    shake(fresh_model)
    save_adapter(fresh_model, shape, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(plain_logits(theirs), logits(fresh_model), rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("adapter", "theirs"):
        again = load(str(tiny_model_folder), World())
        assert load_adapter(again, tmp_path / folder).lowest == 1
        assert torch.equal(logits(again), logits(fresh_model))


def other_base(folder: Path, out: Path, **changes: int) -> Model:
    shutil.copytree(folder, out)
    config = LlamaConfig.from_pretrained(folder)
    config.update(changes)
    LlamaForCausalLM(config).save_pretrained(out)
    return load(str(out), World())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 3}, "does not fit this base: model.layers.2"),
        ({"intermediate_size": 96}, "has another shape"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    changes: dict[str, int], reason: str, adapted: Model, tiny_model_folder: Path, tmp_path: Path
) -> None:
    save_adapter(adapted, SHAPE, tmp_path / "adapter")
    with pytest.raises(ModelError, match=reason) as caught:
        load_adapter(other_base(tiny_model_folder, tmp_path / "other", **changes), tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(caught.value)
    assert "base it was trained on" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "all"},
        {"alpha_pattern": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 1}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    change: dict[str, object], adapted: Model, fresh_model: Model, tmp_path: Path
) -> None:
    save_adapter(adapted, SHAPE, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match="only plain LoRA"):
        load_adapter(fresh_model, tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["no folder", "not json", "no rank", "cut weights"])
def test_a_damaged_adapter_is_refused_with_its_folder(
    damage: str, adapted: Model, fresh_model: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(adapted, SHAPE, folder)
    if damage == "no folder":
        folder = tmp_path / "nothing"
    elif damage == "not json":
        (folder / "adapter_config.json").write_text("{")
    elif damage == "no rank":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    else:
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{folder}: cannot read the adapter"):
        load_adapter(fresh_model, folder)


def test_an_unknown_target_names_the_layers_there_are(fresh_model: Model) -> None:
    with pytest.raises(ModelError, match=r"no linear layer is called c_attn\n.*down_proj, gate_proj"):
        attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0, target=("c_attn",)), head=fresh_model.head)


@pytest.mark.parametrize("target", [("lm_head",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("lowest", [0, 1], ids=["lora", "economy"])
def test_the_output_layer_as_a_target_is_refused_and_not_left_untrained(
    target: tuple[str, ...], lowest: int, fresh_model: Model
) -> None:
    shape = LoraShape(rank=4, alpha=8.0, target=target, lowest=lowest)
    with pytest.raises(ModelError, match=r"lora\.target.*output layer.*lm_head.*\nLeave lm_head out"):
        attach_lora(fresh_model.hf, shape, head=fresh_model.head)


def test_a_foreign_adapter_of_the_output_layer_is_refused_with_its_folder(
    adapted: Model, fresh_model: Model, tmp_path: Path
) -> None:
    folder = save_adapter(adapted, SHAPE, tmp_path / "adapter")
    sides = {"lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(len(fresh_model.head_weight), 4)}
    tensors = {f"base_model.model.lm_head.{side}.weight": matrix for side, matrix in sides.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"{folder}: .*output layer"):
        load_adapter(fresh_model, folder)


def test_a_saved_model_leaves_its_makers_sampling_behind(fresh_model: Model, tmp_path: Path) -> None:
    fresh_model.hf.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.1, pad_token_id=0)
    save_model(fresh_model, tmp_path / "model")
    kept = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == list(fresh_model.eos_ids)
    assert kept["pad_token_id"] == 0
    assert all(key.endswith("_token_id") for key in kept)


def test_a_saved_model_answers_bit_for_bit(fresh_model: Model, tmp_path: Path) -> None:
    save_model(fresh_model, tmp_path / "model")
    again = load(str(tmp_path / "model"), World())
    assert torch.equal(logits(again), logits(fresh_model))
    assert again.eos_ids == fresh_model.eos_ids
    assert again.tokenizer.chat_template == fresh_model.tokenizer.chat_template


def test_answers_drawn_with_an_adapter_have_its_log_probs_and_leave_no_trace(
    tiny_model_folder: Path,
) -> None:
    model = load(str(tiny_model_folder), World())
    attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)
    with torch.no_grad():
        for layer in lora_layers(model.hf).values():
            layer.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    prompt = np.arange(3, 15)
    (answer,) = sample(model, [prompt], Sampling(max_new_tokens=6, temperature=1.0))
    tokens = np.concatenate([prompt, answer.tokens])
    weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
    scored = score(model, pack_one([Example(tokens=tokens, weights=weights, id="one")])).log_probs
    np.testing.assert_allclose(answer.log_probs, scored.detach().numpy(), atol=1e-4)
    after = model.hf.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
