"""Turn a .gguf file into a plain transformers folder, because training needs floats and a tokenizer that is exact.

transformers can read .gguf files, but slowly (it parses the header again for config, weights and tokenizer, and builds
its table of names once per submodule), and it forgets how some tokenizers split text before merging, so that the same
sentence gets other tokens than the model was trained on. The common architectures are therefore converted here, without
torch; the others go through transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ..errors import FolderError, ModelError
from ..folder import write_json, write_manifest, written_aside

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # kinds of token in `tokenizer.ggml.token_type`
_UNREADABLE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)

Fields = dict[str, Any]


def convert_gguf(path: Path, out: Path) -> Path:
    """Write the model and tokenizer of a .gguf file to the folder `out` (float32, with a manifest); returns `out`.

    `out` appears whole or not at all. Raises ModelError if the file is absent, damaged or of a kind that would not
    come out exact; FolderError if `out` cannot be written.
    """
    reader, fields = _open(path)
    _refuse_scaled_rotary(path, fields, reader)
    with written_aside(out) as folder:
        try:
            _convert(path, reader, fields, folder)
        except _UNREADABLE as error:
            raise _damaged(path, error) from error
        write_manifest(folder)
    return out


def _convert(path: Path, reader: GGUFReader, fields: Fields, folder: Path) -> None:
    special = _special_tokens(path, fields)
    if fields.get("tokenizer.ggml.model") == "gpt2":
        tokenizer = byte_level_tokenizer(path, fields)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", _tokenizer_config(fields, special))
    else:
        _tokenizer_through_transformers(path, folder, fields, special)
    ids = {f"{role}_token_id": token_id for role, token_id in special.items() if role != "unk"}
    if _is_direct(fields, reader):
        config = _config(fields, reader)
        write_json(folder / "config.json", {**config, **ids})
        _save_weights(folder, dict(_weights(reader, config)))
    else:
        _model_through_transformers(path, folder, ids)
    write_json(folder / "generation_config.json", ids)


def _open(path: Path) -> tuple[GGUFReader, Fields]:
    """The parsed file and its metadata. Raises ModelError if it is absent, no GGUF file, or damaged."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path), fix="Check the path.") from None
    if magic != b"GGUF":
        fix = "Give a file in GGUF format, a transformers folder or a hub id."
        raise ModelError("is not a GGUF file", where=str(path), fix=fix)
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if not isinstance(fields.get("general.architecture"), str) or not reader.tensors:
        raise ModelError("holds no model", where=str(path), fix="Give the file with the weights, not a vocabulary.")
    return reader, fields


def _damaged(path: Path, error: Exception) -> ModelError:
    fix = "Download it again and compare its size with the source."
    return ModelError(f"is damaged or cut short ({error})", where=str(path), fix=fix)


def _refuse_scaled_rotary(path: Path, fields: Fields, reader: GGUFReader) -> None:
    """Stretched rotary positions are stored in ways that transformers drops silently; say so instead."""
    scaling = fields.get(f"{fields['general.architecture']}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_f") for tensor in reader.tensors):
        fix = "Use the same model as a transformers folder or by its hub id."
        raise ModelError("stretches its rotary positions, which is not converted", where=str(path), fix=fix)


# Weights


def _is_direct(fields: Fields, reader: GGUFReader) -> bool:
    """Whether every tensor of the file has a known place, so that nothing is dropped."""
    architecture = fields["general.architecture"]
    return architecture in CLASSES and all(tensor_target(tensor.name, architecture) for tensor in reader.tensors)


def tensor_target(name: str, architecture: str) -> str:
    """The name of a tensor in transformers; empty if it has none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES or (match[3] == "bias" and architecture != "qwen2"):
        return ""
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{NAMES[match[2]]}.{match[3]}"


def _config(fields: Fields, reader: GGUFReader) -> dict[str, Any]:
    """`config.json` of the direct architectures, without the ids of special tokens."""
    architecture = fields["general.architecture"]
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}

    def read(key: str, default: Any = None) -> Any:
        value = fields.get(f"{architecture}.{key}", default)
        if value is None:
            raise KeyError(f"{architecture}.{key}")
        return value

    heads = read("attention.head_count")
    return {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "vocab_size": shapes["token_embd.weight"][1],
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", heads),
        "head_dim": shapes["blk.0.attn_q.weight"][1] // heads,
        "max_position_embeddings": read("context_length"),
        "rms_norm_eps": _shortest(read("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": _shortest(read("rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _weights(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Every tensor, dequantised to float32, under its name in transformers."""
    architecture = config["model_type"]
    for tensor in reader.tensors:
        values = _dequantise(tensor)
        if architecture == "llama" and ".attn_q." in tensor.name:
            values = _rotary_halves(values, config["num_attention_heads"])
        elif architecture == "llama" and ".attn_k." in tensor.name:
            values = _rotary_halves(values, config["num_key_value_heads"])
        yield tensor_target(tensor.name, architecture), values


def _dequantise(tensor: ReaderTensor) -> Float[np.ndarray, "..."]:
    from gguf.quants import dequantize

    return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _rotary_halves(rows: Float[np.ndarray, "out D"], heads: int) -> Float[np.ndarray, "out D"]:
    """Undo llama.cpp's order of q and k rows: it rotates neighbours, transformers the two halves of a head."""
    out, width = rows.shape
    pairs = rows.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(out, width)


def _save_weights(folder: Path, weights: dict[str, Float[np.ndarray, "..."]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        fix = "Free some space: the weights take four bytes per parameter."
        raise FolderError(f"cannot write the weights ({error})", where=str(folder), fix=fix) from error


def _model_through_transformers(path: Path, folder: Path, ids: dict[str, int]) -> None:
    """Other architectures: transformers maps the tensors. Raises ModelError for those that it does not know."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, RuntimeError, NotImplementedError, ImportError) as error:
        fix = "Use the same model as a transformers folder or by its hub id."
        raise ModelError(f"cannot be converted ({error})", where=str(path), fix=fix) from error
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", {**config, **ids, "architectures": [type(model).__name__], "dtype": "float32"})
    # Tied weights share memory and are saved once, under the first name: that of the embedding.
    tensors = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(model.state_dict().items())}
    save_file({n: t.contiguous() for n, t in tensors.values()}, folder / "model.safetensors", metadata={"format": "pt"})


# Tokenizer


def byte_level_tokenizer(path: Path, fields: Fields) -> Tokenizer:
    """Byte-level BPE with the pre-tokenizer that the file names (`tokenizer.ggml.pre`).

    Raises ModelError for one that is not known: a guess would give other tokens than the model was trained on.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = fields.get("tokenizer.ggml.pre", "missing")
    steps = _pre_tokenizer_steps(name)
    if not steps:
        fix = "Use the same model as a transformers folder or by its hub id."
        raise ModelError(f"has an unknown pre-tokenizer ({name})", where=str(path), fix=fix)
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in fields["tokenizer.ggml.merges"])]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name.startswith("llama")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    kinds = fields["tokenizer.ggml.token_type"]
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos_id = fields["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _pre_tokenizer_steps(name: str) -> list[Any]:
    """How text is cut before merging, by llama.cpp's name for it; empty if the name is not known."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    def words(digits: str) -> list[Any]:
        split = Split(Regex(_WORDS.replace("DIGITS", digits)), behavior="isolated")
        return [split, ByteLevel(add_prefix_space=False, use_regex=False)]

    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "smollm" | "starcoder" | "refact" | "command-r" | "codeshell":
            return [Digits(individual_digits=True), gpt2]
        case "gpt-2":
            return [gpt2]
        case "llama-bpe" | "llama3" | "llama-v3":
            return words("{1,3}")
        case "qwen2" | "deepseek-r1-qwen":
            return words("")
        case _:
            return []


def _special_tokens(path: Path, fields: Fields) -> dict[str, int]:
    """Ids of bos, eos, unk (where the file names them) and of a pad that is never eos, or no end would be learned."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown"}
    found = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in names.items()}
    special = {role: int(token_id) for role, token_id in found.items() if token_id is not None}
    if "eos" not in special:
        raise ModelError("names no end-of-turn token", where=str(path), fix="Use an instruction-tuned model.")
    control = [i for i, kind in enumerate(fields.get("tokenizer.ggml.token_type", ())) if kind == CONTROL]
    wanted = [fields.get("tokenizer.ggml.padding_token_id"), special.get("unk"), *control, special.get("bos")]
    pads = [int(token_id) for token_id in wanted if token_id is not None and token_id != special["eos"]]
    if not pads:
        raise ModelError("has no token to pad with besides eos", where=str(path), fix="Use another base model.")
    return {**special, "pad": pads[0]}


def _tokenizer_config(fields: Fields, special: dict[str, int]) -> dict[str, Any]:
    """`tokenizer_config.json` for a `tokenizer.json` that is used as it is."""
    tokens = fields["tokenizer.ggml.tokens"]
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.get(f"{fields['general.architecture']}.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokens[token_id] for role, token_id in special.items()},
        **({"chat_template": template} if template else {}),
    }


def _tokenizer_through_transformers(path: Path, folder: Path, fields: Fields, special: dict[str, int]) -> None:
    """Sentencepiece and the like: transformers rebuilds the tokenizer, the pad is ours."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8"))
    ours = _tokenizer_config(fields, special)
    del ours["tokenizer_class"]
    write_json(config_path, {**config, **ours})
