"""From a name to a model that can be trained: weights, tokenizer, template, and what the engine must know of them.

Safetensors only, no code from the model's folder, and one probe: log-probabilities of packed rows must equal those of
the model's own forward pass. An architecture that fails it is trained one example a row, and says so.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..errors import ModelError
from ..folder import RunFolder, is_run_folder, read_json, sha256_file
from ..recipe import Weights
from ..texts import beginning
from ..types import Derived
from ..world import World
from .attention import NAME, register
from .blocks import Blocks
from .builtin import builtin_model, cache_folder
from .eight_bits import keep_in_eight_bits, rounded_numbers
from .fused import use_fused
from .gguf import convert_gguf
from .linear import Linear, use_fast_linear, widen_others
from .lora import block_of, freeze_beside, language_model
from .merge import merge_files
from .once import made_once
from .pinned import check_base
from .probe import apart, context_of, hold_still, probe, probed_blocks
from .stored import EIGHT_BITS, FLOAT32, kept_as

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
_RUNS_CODE = {"auto_map", "trust_remote_code", "attn_implementation"}
_READ_BY_TRANSFORMERS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_READ_BY_OTHERS = ["consolidated*", "original/*", "onnx/*"]  # the weights once more, as large
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
# Before a template that can think: rows are trained, judged and served without thoughts. It is handed over with the
# template, since other programs ask for thoughts unless they are told not to; asked for by name they still come.
NO_THOUGHTS = "{% set enable_thinking = enable_thinking | default(false) %}"
CAN_THINK = "enable_thinking"
ROUNDED = "the base is approximate: rounded to 8 bits a number; its rounded.json says what that cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What turns text into a model's tokens and back; all that looking at data needs."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    context_tokens: int
    folder: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A causal language model, ready for the engine.

    `packs` says whether rows may share one stream; `blocks`, where the architecture has them, are its own forward pass.
    `weights` is the type in which matrices are kept, with the reason; `sharing` processes share the device's memory.
    """

    hf: PreTrainedModel
    vocabulary: Vocabulary
    packs: bool
    weights: Derived = FLOAT32
    blocks: Blocks | None = None
    notes: tuple[str, ...] = ()
    sharing: int = 1

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer with its chat template."""
        return self.vocabulary.tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.vocabulary.eos_ids

    @property
    def body(self) -> nn.Module:
        """Everything below the output layer."""
        return self.hf.base_model

    @property
    def head(self) -> nn.Linear:
        """The output layer."""
        head = self.hf.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def head_weight(self) -> Tensor:
        """The output layer's matrix, [V D]."""
        return self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def parameters(self) -> int:
        """Number of distinct weights of the base, adapters not counted."""
        return sum(p.numel() for name, p in self.hf.named_parameters() if "lora_" not in name)

    @property
    def product_parameters(self) -> int:
        """Weights that take part in a matrix product per token: linear layers and the head, not the embedding."""
        return sum(weights for _, weights in self._products()) + self.head_weight.numel()

    @property
    def lower_parameters(self) -> int:
        """Those of them in blocks that lie before everything trained, so that no gradient passes."""
        trained = [block_of(name) for name, parameter in self.hf.named_parameters() if parameter.requires_grad]
        lowest = min((0 if block is None else block for block in trained), default=0)
        return sum(weights for name, weights in self._products() if (block_of(name) or 0) < lowest)

    def _products(self) -> Iterator[tuple[str, int]]:
        """Name and number of weights of every linear layer of the language model but the head."""
        for name, module in language_model(self.hf).named_modules():
            if isinstance(module, (Linear, Conv1D)) and module is not self.head:
                yield name, module.weight.numel()


def resolve(base: str) -> Path:
    """The folder of a base model: a built-in name, a folder, a run, a .gguf file, or a hub id fetched by transformers.

    Raises ModelError when there is no such model, or its folder is not safe or not complete.
    """
    built_in = builtin_model(base)
    if built_in is not None:
        return built_in
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("no such file", where=base, fix="Give the path of an existing .gguf file.")
        return _converted(path)
    if is_run_folder(path):
        return _of_run(RunFolder(path=path))
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            "this is a file", where=f"base: {base}", fix="Give the folder of the model that it belongs to."
        )
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise ModelError(
            "no such model folder",
            where=f"base: {base}",
            fix=f"Looked for {path.absolute()}. Give a built-in name, a folder, a .gguf file or a hub id.",
        )
    return _from_hub(base)


def _of_run(run: RunFolder) -> Path:
    """What a finished run handed over, as a plain folder: its model, or its adapter merged once into its base."""
    where, fix = str(run.path), "Finish that run with `tunesmith run`, or name another base."
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    if recipe.get("method") == "reward":
        raise ModelError("a reward model gives scores, not answers", where=f"base: {where}", fix="Name it as reward:.")
    if not run.results.is_file():
        raise ModelError("the run has not finished", where=f"base: {where}", fix=fix)
    subject = str(read_json(run.results).get("subject"))
    if subject == "full":
        return run.model

    def merge(out: Path) -> None:
        base = resolve(recipe["base"])
        check_base(run, base)
        merge_files(base, run.handed_over(subject), out)

    return made_once(run.path / "merged", merge)


def _converted(path: Path) -> Path:
    """The plain folder of a .gguf file, converted once per content."""
    return made_once(cache_folder() / f"gguf-{sha256_file(path)[:16]}", lambda out: convert_gguf(path, out))


def load_vocabulary(base: str) -> Vocabulary:
    """Tokenizer, template and end of turn of a base model, without its weights. Raises ModelError."""
    folder = resolve(base)
    check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    except _UNREADABLE as error:
        raise _unreadable(folder, error) from error
    notes = []
    if not tokenizer.chat_template:
        tokenizer.chat_template = ("{{ bos_token }}" if beginning(tokenizer) else "") + PLAIN_TEMPLATE
        notes.append(
            "the model has no chat template; turns are joined by line ends, answers end with the end-of-text token"
        )
    template = tokenizer.chat_template
    if isinstance(template, str) and CAN_THINK in template and not template.startswith(NO_THOUGHTS):
        tokenizer.chat_template = NO_THOUGHTS + template
    text = config.get_text_config()  # its part about text, where a model also sees or hears
    ends = getattr(config, "eos_token_id", None) or text.eos_token_id
    named = [generation.eos_token_id if generation else None, tokenizer.eos_token_id, ends]
    ids = [i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
    if not ids:
        raise ModelError(
            "the model names no end-of-turn token", where=str(folder), fix="Set eos_token_id in generation_config.json."
        )
    return Vocabulary(
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys(int(i) for i in ids)),
        context_tokens=context_of(config),
        folder=folder,
        notes=tuple(notes),
    )


def load(base: str, world: World, weights: Weights = "auto") -> Model:
    """Load a base model for training on `world.device`. Raises ModelError with the file to look at.

    What `weights` keeps in 16 bits on a CPU is mapped from its files and must stay frozen, as what it keeps in 8 must.
    """
    vocabulary = load_vocabulary(base)
    register()
    try:
        kept = kept_as(vocabulary.folder, weights, world)
        with without_progress_bars():
            hf, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                vocabulary.folder,
                dtype="float16" if kept.value == EIGHT_BITS else kept.value,
                attn_implementation=NAME,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except _UNREADABLE as error:
        raise _unreadable(vocabulary.folder, error) from error
    if report["missing_keys"]:
        raise _unreadable(vocabulary.folder, f"the weights lack {min(report['missing_keys'])}")
    hf.eval()
    freeze_beside(hf)
    use_fast_linear(hf)
    if kept.value == EIGHT_BITS:
        keep_in_eight_bits(hf, vocabulary.folder, world.device)
    hf.to(world.device)
    if world.device.type == "cpu" and kept.value != "float32":
        widen_others(hf)
    use_fused(hf)
    notes = [*vocabulary.notes, *([ROUNDED] if rounded_numbers(vocabulary.folder) else []), *hold_still(hf)]
    difference = probe(hf, world.device)
    if math.isnan(difference):
        raise _unreadable(vocabulary.folder, "its log-probabilities are not numbers")
    reason = apart(hf, difference)
    packs = not reason
    if reason:
        hf.set_attn_implementation("eager")  # the reference: others drop what they do not know (soft caps, sinks)
        notes.append(f"{type(hf).__name__} {reason}; one example a row instead")
    blocks = probed_blocks(hf) if packs else None
    about = {"weights": kept, "notes": tuple(notes), "sharing": world.sharing}
    return Model(hf=hf, vocabulary=vocabulary, packs=packs, blocks=blocks, **about)


def _unreadable(folder: Path, error: Exception | str) -> ModelError:
    first = str(error).strip().split("\n")[0]
    return ModelError(
        f"cannot load the model: {first}", where=str(folder), fix="Check that the folder is complete and undamaged."
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' own bars from the screen: progress is shown in one place, and not when told to be quiet."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is incomplete or would run code. Raises ModelError."""
    where = folder / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "config.json is missing", where=str(folder), fix="Point base: at a whole transformers folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=str(folder), fix="Fetch the model again."
        ) from None
    unsafe = [key for key in _keys(config) if key in _RUNS_CODE or key.startswith("_attn_implementation")]
    if unsafe:
        raise ModelError(
            f"config.json asks for {unsafe[0]!r}, which can run foreign code",
            where=str(where),
            fix="Use a model that transformers knows.",
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            "there are no .safetensors weights",
            where=str(folder),
            fix="Convert the weights to safetensors; pickled weights are never opened.",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            "the tokenizer is missing", where=str(folder), fix="Copy the tokenizer's files into the folder."
        )


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [key for part in value.values() for key in _keys(part)]
    return [key for part in value for key in _keys(part)] if isinstance(value, list) else []


def _from_hub(base: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Path(snapshot_download(base, allow_patterns=_READ_BY_TRANSFORMERS, ignore_patterns=_READ_BY_OTHERS))
    except Exception as error:  # the hub client raises many types; each means that the model cannot be had
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot fetch from the hub: {reason}",
            where=f"base: {base}",
            fix="Check the name and the network, or give a local folder.",
        ) from None
