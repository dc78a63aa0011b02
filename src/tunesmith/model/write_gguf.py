"""Write a plain transformers folder as a .gguf file: the way back of gguf.py, for the same architectures.

Tokens, template and end of turn go inside, so that llama.cpp needs nothing else. What would come out different
(stretched positions, a tokenizer that llama.cpp cuts otherwise, a tensor without a place) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig

from ..errors import ModelError
from ..folder import storage_errors
from ..texts import beginning
from .gguf import CLASSES, CONTROL, NAMES, USER_DEFINED, byte_level_tokenizer, tensor_target
from .load import CAN_THINK, Vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # what the gguf package can write
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}  # llama.h
_COARSE = ("q5_1", "q5_0", "q4_1", "q4_0")
_NORMAL, _UNUSED = 1, 5  # kinds of token
_NEVER_THINK = "{% set enable_thinking = false %}"  # llama.cpp's server asks for thoughts by name, if the template can
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2")
_TEXTS = (
    "It's 12345 S. 678, isn't IT?",
    "  two  spaces\n\n\n  x\t\ty ",
    "naïve 日本語 ½ ٣٤ 😀 e\u0301",
    "def f(x):\n    return x**2",
    "a_b-c/d\\e {'k': [1.5e-10, null]}",
    "\r\n\r\n tail   ",
    "3rd 1st 007 1,000,000.00",
    "WONG v BAKER, vol. 132, Pac.Rep.",
)


def write_gguf(folder: Path, target: Path, kind: str, vocabulary: Vocabulary, end_of_turn: int, name: str) -> None:
    """Write the model of `folder` as `target`, its matrices as `kind` (one of TYPES), one tensor in memory at a time.

    Raises ModelError where the file would not say the same as the folder; FolderError if it cannot be written.
    """
    from gguf import GGUFWriter

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_architecture(config, folder)
    weights = _weights(folder)
    names = {_gguf_name(name, config.model_type, folder): name for name in weights}
    if config.tie_word_embeddings:
        names.pop("output.weight", None)
    rows = weights[names["token_embd.weight"]]().shape[0]
    writer = GGUFWriter(target, config.model_type)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer_fields(folder, vocabulary, rows), vocabulary, end_of_turn)
    for ours, theirs in names.items():
        values = weights[theirs]()
        stored = _stored_as(ours, tuple(values.shape), kind, tied="output.weight" not in names)
        writer.add_tensor_info(ours, values.shape, np.dtype(np.float32), _bytes(values.shape, stored), stored)
    with storage_errors(target), closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, theirs in names.items():
            values = weights[theirs]()
            stored = _stored_as(ours, tuple(values.shape), kind, tied="output.weight" not in names)
            writer.write_tensor_data(quantised(_turned(ours, values, config), stored))


def quantised(values: Float[np.ndarray, "..."], stored: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor. Halves overflow above 65504; that is refused by ModelError, not written as infinity."""
    from gguf.quants import quantize

    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # blocks of next to nothing become zeros
        data = quantize(np.ascontiguousarray(values), stored)
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise ModelError("a weight is too large for 16-bit floats", where=stored.name, fix="Use --type bf16 or f32.")
    return data


def check_architecture(config: Any, folder: Path) -> None:
    """Refuse what gguf.py could not read back exactly. Raises ModelError."""
    fix = "Use --to merged: transformers folders hold every architecture."
    problem = ""
    if config.model_type not in CLASSES:
        problem = f"architecture {config.model_type} is not written as GGUF (known: {', '.join(CLASSES)})"
    elif config.rope_parameters.get("rope_type", "default") != "default":
        problem = "stretched rotary positions are not written as GGUF"
    elif config.hidden_act != "silu":
        problem = f"activation {config.hidden_act} is not what llama.cpp computes for {config.model_type}"
    elif getattr(config, "use_sliding_window", False):
        problem = "attention in a sliding window is not written as GGUF"
    if problem:
        raise ModelError(problem, where=str(folder / "config.json"), fix=fix)


# Weights


def _weights(folder: Path) -> dict[str, Callable[[], Float[np.ndarray, "..."]]]:
    """A reader in float32 for every tensor of the folder."""

    def reader(path: Path, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).to(torch.float32).numpy()

        return read

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: reader(path, name) for name in file.keys()}  # noqa: SIM118, not a mapping
    return found


def _gguf_name(name: str, architecture: str, folder: Path) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`. Raises ModelError for a tensor without a place."""
    backwards = {theirs: ours for ours, theirs in NAMES.items()}
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match and match[2] in backwards:
        ours = f"{f'blk.{match[1]}.' if match[1] else ''}{backwards[match[2]]}.{match[3]}"
        if tensor_target(ours, architecture) == name:
            return ours
    fix = "Use --to merged: transformers folders hold every tensor."
    raise ModelError(f"the tensor {name} has no place in a GGUF file", where=str(folder), fix=fix)


def _turned(name: str, values: Float[np.ndarray, "..."], config: Any) -> Float[np.ndarray, "..."]:
    """llama.cpp rotates neighbouring rows of q and k where transformers rotates the halves of a head (llama only)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return values
    out, width = values.shape
    return values.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def _stored_as(name: str, shape: tuple[int, ...], kind: str, *, tied: bool) -> GGMLQuantizationType:
    """Vectors stay float32. The output layer, which is the embedding where both are tied, is at least q8_0: most of
    the error of coarse files comes from it. Rows that blocks do not divide are halves, as llama.cpp does."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    is_output = name == ("token_embd.weight" if tied else "output.weight")
    stored = GGMLQuantizationType["Q8_0" if is_output and kind in _COARSE else kind.upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[stored][0] else stored


def _bytes(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[stored]
    return int(np.prod(shape)) // block * size


# Metadata


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tokenizer_fields(folder: Path, vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """Tokens, kinds, merges and the pre-tokenizer's name, as the file's metadata will hold them.

    `rows` is the height of the embedding; rows without a token get a name that no text is cut into. Raises ModelError
    for a tokenizer that llama.cpp has no name for, and for a token that the embedding has no row for.
    """
    where, fix = str(folder / "tokenizer.json"), "Use --to merged: transformers reads this tokenizer."
    try:
        state = json.loads(Path(where).read_text(encoding="utf-8"))
        model, added = state["model"], state["added_tokens"]
    except (OSError, ValueError, KeyError):
        raise ModelError("the tokenizer has no tokenizer.json, which GGUF is made from", where=where, fix=fix) from None
    if model.get("type") != "BPE":
        raise ModelError(f"a {model.get('type')} tokenizer is not written as GGUF", where=where, fix=fix)
    by_id = {token_id: token for token, token_id in model["vocab"].items()}
    kinds = dict.fromkeys(by_id, _NORMAL)
    for token in added:
        by_id[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(by_id) >= rows:
        what = f"token {by_id[max(by_id)]!r} has the id {max(by_id)}, and the embedding {rows} rows"
        raise ModelError(what, where=where, fix="Resize the base's embedding to its tokenizer, then train again.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields = {
        "tokenizer.ggml.tokens": [by_id.get(row, f"[PAD{row}]") for row in range(rows)],
        "tokenizer.ggml.token_type": [kinds.get(row, _UNUSED) for row in range(rows)],
        "tokenizer.ggml.merges": merges,
    }
    name = _pre_tokenizer(Path(where), fields)
    if not name:
        what = "the tokenizer cuts text in a way that llama.cpp has no name for here"
        raise ModelError(f"{what} (tried: {', '.join(_PRE_TOKENIZERS)})", where=where, fix=fix)
    return {**fields, "tokenizer.ggml.pre": name, "add_bos": bool(beginning(vocabulary.tokenizer))}


def _pre_tokenizer(path: Path, fields: Mapping[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer cuts text: the one that gives the same tokens for texts that tell."""
    tokenizer = Tokenizer.from_file(str(path))
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in _TEXTS]
    for name in _PRE_TOKENIZERS:
        candidate = byte_level_tokenizer(path, {**fields, "tokenizer.ggml.pre": name})
        if [candidate.encode(text, add_special_tokens=False).ids for text in _TEXTS] == wanted:
            return name
    return ""


def _add_tokenizer(writer: GGUFWriter, fields: Mapping[str, Any], vocabulary: Vocabulary, end_of_turn: int) -> None:
    """llama.cpp stops at eos, eot and eom: the tokenizer's own end, the end of a turn, and one more where there is."""
    tokenizer = vocabulary.tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_add_bos_token(fields["add_bos"])
    eos = end_of_turn if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(end_of_turn)
    for other in [token for token in vocabulary.eos_ids if token not in (eos, end_of_turn)][:1]:
        writer.add_eom_token_id(other)
    named = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, token in named.items():
        if token is not None:
            add(int(token))  # type: ignore[arg-type]
    found = tokenizer.chat_template
    templates = found if isinstance(found, dict) else {"default": str(found)}  # some bases have another one for tools
    writer.add_chat_template([{"name": name, "template": _unthinking(told)} for name, told in templates.items()])


def _unthinking(template: str) -> str:
    return _NEVER_THINK + template if CAN_THINK in template else template
