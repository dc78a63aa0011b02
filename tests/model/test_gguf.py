"""A converted .gguf answers exactly as the model it came from, with exactly its tokens, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.errors import ModelError
from tunesmith.folder import manifest_problem
from tunesmith.model import gguf as conversion
from tunesmith.model.gguf import convert_gguf

LLAMA_CPP = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
}
TEXTS = ("12345 S. 678", "def f(x):\n    return x**2\n", "naïve 日本 ½ ٣٤ 😀", "  two  spaces ", "it's\n\n\n  x")

Write = Callable[..., Path]


def model_of(kind: str, folder: Path) -> Any:
    """The tiny llama, or a random model of another architecture with the same sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(folder)
    sizes = json.loads((folder / "config.json").read_text())
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    chosen = {key: sizes[key] for key in (*keep, "num_key_value_heads", "max_position_embeddings")}
    if kind == "qwen3":
        chosen["head_dim"] = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, tie_word_embeddings=False, **chosen))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return model.eval()


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of q and k rows in llama.cpp, as a plain loop: row i of the first half, then row i of the second."""
    half = len(rows) // heads // 2
    order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


@pytest.fixture
def write(tmp_path: Path, tiny_tokenizer: Any) -> Write:
    """Write a model and the tiny tokenizer as llama.cpp would; keyword arguments replace metadata."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    def write(model: Any, quantised: bool = False, tensors: tuple[str, ...] = (), **changes: Any) -> Path:
        config = model.config
        kind = config.model_type
        path = tmp_path / f"{kind}.gguf"
        writer = GGUFWriter(path, kind)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        add_tokenizer(writer, tiny_tokenizer, changes)
        for name, parameter in model.named_parameters():
            values = parameter.detach().numpy()
            if kind == "llama" and ("q_proj" in name or "k_proj" in name):
                values = neighbours(
                    values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                )
            for ours, theirs in LLAMA_CPP.items():
                name = name.replace(ours, theirs)
            name = name.replace("model.", "").replace("lm_head", "output")
            if quantised and values.ndim == 2:
                q8 = GGMLQuantizationType.Q8_0
                writer.add_tensor(name, quantize(values, q8), raw_dtype=q8)
            else:
                writer.add_tensor(name, values)
        for name in tensors:
            writer.add_tensor(name, np.ones(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_tokenizer(writer: Any, tokenizer: Any, changes: dict[str, Any]) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    if "scaling" in changes:
        writer.add_string(f"{writer.arch}.rope.scaling.type", changes["scaling"])
    if changes.get("add_bos"):
        writer.add_add_bos_token(True)


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(40)[None] % 7 + 3).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_converted_model_gives_the_same_logits_bit_for_bit(
    kind: str, tiny_model_folder: Path, write: Write, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = model_of(kind, tiny_model_folder)
    out = convert_gguf(write(model), tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(converted), logits(model))
    assert manifest_problem(out) == ""
    assert converted.config.tie_word_embeddings == (kind == "llama")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_our_path_and_that_of_transformers_give_the_same_weights(
    kind: str, tiny_model_folder: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    path = write(model_of(kind, tiny_model_folder), quantised=True)
    ours = load_file(convert_gguf(path, tmp_path / "ours") / "model.safetensors")
    monkeypatch.setattr(conversion, "CLASSES", {})
    theirs = load_file(convert_gguf(path, tmp_path / "theirs") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_tokenizer_gives_the_same_tokens_and_the_text_back(
    tiny_model_folder: Path, write: Write, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        convert_gguf(write(model_of("llama", tiny_model_folder)), tmp_path / "out")
    )
    special = "<|im_start|>user\nhi<|im_end|>\n"
    for text in (*TEXTS, special):
        ids = tokenizer(text)["input_ids"]
        assert ids == tiny_tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}]
    prompts = [
        t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (tokenizer, tiny_tokenizer)
    ]
    assert prompts[0] == prompts[1]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2


def test_pad_is_never_eos(tiny_model_folder: Path, write: Write, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    out = convert_gguf(write(model_of("llama", tiny_model_folder)), tmp_path / "out")  # the file says pad = eos = 2
    for saved in (
        AutoTokenizer.from_pretrained(out),
        AutoConfig.from_pretrained(out),
        GenerationConfig.from_pretrained(out),
    ):
        assert (saved.pad_token_id, saved.eos_token_id) == (0, 2)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_digits_stand_alone_and_any_text_comes_back(tiny_tokenizer: Any, text: str) -> None:
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    fields = {
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
    }
    tokenizer = conversion.byte_level_tokenizer(Path("x.gguf"), fields)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 12 b34")]
    assert pieces == ["a", "Ġ", "1", "2", "Ġb", "3", "4"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġ", "Ġx", "!!"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ", "Ġx", "!!"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ", "Ġx", "!!"]),
    ],
)
def test_each_known_pre_tokenizer_splits_as_its_models_do(
    pre: str, pieces: list[str], tiny_model_folder: Path, write: Write, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    out = convert_gguf(write(model_of("llama", tiny_model_folder), pre=pre), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234  x!!")] == pieces


def test_a_file_that_wants_bos_in_front_gets_it(tiny_model_folder: Path, write: Write, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = convert_gguf(write(model_of("llama", tiny_model_folder), add_bos=True), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == tokenizer("a")["input_ids"][1:]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pre": "unheard-of"}, "unknown pre-tokenizer"),
        ({"scaling": "yarn"}, "rotary"),
        ({"tensors": ("rope_freqs.weight",)}, "rotary"),
    ],
)
def test_what_would_not_come_out_exact_is_refused_and_leaves_nothing(
    changes: dict[str, Any], what: str, tiny_model_folder: Path, write: Write, tmp_path: Path
) -> None:
    path = write(model_of("llama", tiny_model_folder), **changes)
    with pytest.raises(ModelError, match=what) as caught:
        convert_gguf(path, tmp_path / "out")
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_cut_short_anywhere_is_refused(tiny_model_folder: Path, write: Write, tmp_path: Path) -> None:
    path = write(model_of("llama", tiny_model_folder))
    whole = path.read_bytes()
    for length in [4, 20, *range(40, 4000, 397), len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="damaged") as caught:
            convert_gguf(path, tmp_path / "out")
        assert "Download it again" in caught.value.fix
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip archive"])
def test_another_kind_of_file_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert_gguf(path, tmp_path / "out")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf: cannot be read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
