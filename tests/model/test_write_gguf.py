"""A .gguf file written here holds the model, its tokens and its template, or is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tunesmith.errors import ModelError
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.load import load_vocabulary
from tunesmith.model.write_gguf import TYPES, quantised, write_gguf

TEXTS = ("12345 S. 678", "def f(x):\n    return x**2\n", "naïve 日本 ½ ٣٤ 😀", "  two  spaces ", "<|im_start|>user\nhi")
# The largest error of one weight, as a share of the largest weight of its block of 32.
STEPS = {"q8_0": 0.5 / 127, "q5_1": 1 / 31, "q5_0": 1 / 16, "q4_1": 1 / 15, "q4_0": 1 / 8}


@pytest.fixture
def plain(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "plain")


def other(kind: str, folder: Path, **changes: Any) -> None:
    """Replace the tiny llama in `folder` by a random model of another architecture and the same sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = json.loads((folder / "config.json").read_text())
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    chosen = {key: sizes[key] for key in (*keep, "num_key_value_heads", "max_position_embeddings")} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **chosen))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def written(folder: Path, kind: str = "f32") -> Path:
    vocabulary = load_vocabulary(str(folder))
    target = folder.parent / f"{kind}.gguf"
    write_gguf(folder, target, kind, vocabulary, vocabulary.eos_ids[0], "tiny")
    return target


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(40)[None] % 7 + 3).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_back_bit_for_bit(kind: str, tied: bool, plain: Path, tmp_path: Path) -> None:
    import torch

    other(kind, plain, tie_word_embeddings=tied, **({"head_dim": 32} if kind == "qwen3" else {}))
    back = convert_gguf(written(plain), tmp_path / "back")
    assert torch.equal(logits(back), logits(plain))
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] == tied


def test_tokens_template_and_end_of_turn_are_inside(plain: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from gguf import GGUFReader

    path = written(plain)
    tokenizer: Any = load_vocabulary(str(convert_gguf(path, tmp_path / "back"))).tokenizer
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.chat_template"] == tiny_tokenizer.chat_template
    ids = {fields[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot")}
    assert ids == {tiny_tokenizer.eos_token_id}
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["llama.rope.freq_base"] == 10000
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_a_template_that_can_think_never_does_in_a_gguf_which_llama_cpp_would_ask_to(plain: Path) -> None:
    from gguf import GGUFReader

    (plain / "chat_template.jinja").write_text("{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}")
    template = GGUFReader(written(plain)).fields["tokenizer.chat_template"].contents()
    assert isinstance(template, str)
    shown = jinja2.Environment(autoescape=False).from_string(template)
    for asked in ({}, {"enable_thinking": True}):
        assert shown.render(messages=[{"role": "user", "content": "q"}], **asked) == "q"


def test_a_template_for_tools_beside_the_usual_one_is_inside_too(plain: Path, tiny_tokenizer: Any) -> None:
    from gguf import GGUFReader

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(plain)
    fields = {name: field.contents() for name, field in GGUFReader(written(plain)).fields.items()}
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_rows_of_the_embedding_without_a_token_are_unused(plain: Path) -> None:
    from gguf import GGUFReader

    size = json.loads((plain / "config.json").read_text())["vocab_size"]
    other("llama", plain, vocab_size=size + 4)
    fields = {name: field.contents() for name, field in GGUFReader(written(plain)).fields.items()}
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + extra}]" for extra in range(4)]
    assert fields["tokenizer.ggml.token_type"][size:] == [5] * 4


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_back_and_the_output_layer_is_never_coarse(kind: str, plain: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = written(plain, kind)
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["blk.0.ffn_up.weight"] == kind.upper()
    assert stored["token_embd.weight"] == ("Q8_0" if kind in STEPS else kind.upper())
    difference = float((logits(convert_gguf(path, tmp_path / "back")) - logits(plain)).abs().max())
    assert difference < 0.2


@pytest.mark.parametrize("kind", STEPS)
@settings(max_examples=30)
@given(values=arrays.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32)))
def test_no_weight_moves_by_more_than_a_step_of_its_block(kind: str, values: np.ndarray) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = GGMLQuantizationType[kind.upper()]
    back = dequantize(quantised(values, stored), stored)
    blocks, errors = (part.reshape(-1, 32) for part in (values, np.abs(back - values)))
    spread = np.abs(blocks).max(1) if kind.endswith("_0") else blocks.max(1) - blocks.min(1)
    halves = 2e-3 * np.abs(blocks).max(1) + 1e-4  # scales are kept as 16-bit floats, which end at 6e-8
    assert (errors.max(1) <= STEPS[kind] * spread + halves).all()


def test_a_weight_too_large_for_a_half_is_refused() -> None:
    from gguf import GGMLQuantizationType

    with pytest.raises(ModelError, match="too large for 16-bit floats"):
        quantised(np.full((1, 32), 1e5, dtype=np.float32), GGMLQuantizationType.F16)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_would_come_out_different_is_refused_in_words(plain: Path) -> None:
    from safetensors.numpy import load_file, save_file

    config = plain / "config.json"
    before = config.read_text()
    stretched = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for changes, words in (
        ({"rope_parameters": stretched}, "stretched rotary positions"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"model_type": "gpt_neox"}, "architecture gpt_neox"),
    ):
        edit(config, **changes)
        with pytest.raises((ModelError), match=words) as caught:
            written(plain)
        assert "--to merged" in str(caught.value)
        config.write_text(before)
    weights = load_file(plain / "model.safetensors")
    save_file({**weights, "model.extra.weight": np.ones(4, np.float32)}, plain / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.extra\.weight has no place"):
        written(plain)


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(plain: Path) -> None:
    path = plain / "tokenizer.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(ModelError, match="cuts text in a way"):
        written(plain)


def test_a_token_without_a_row_in_the_embedding_is_refused(plain: Path) -> None:
    size = json.loads((plain / "config.json").read_text())["vocab_size"]
    other("llama", plain, vocab_size=size - 5)
    with pytest.raises(ModelError, match=f"has the id {size - 1}, and the embedding {size - 5} rows"):
        written(plain)
