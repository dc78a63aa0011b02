"""Rows of models that turn queries and keys by the longest row of a call do not change each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tunesmith.evaluate.measure import example_losses
from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling, sample
from tunesmith.types import Example
from tunesmith.world import World

CONTEXT, LONG, SHORT = 64, 90, 30
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
BY_LENGTH = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": CONTEXT,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 3 * n for n in range(8)],
}
STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def longrope(context: int) -> PreTrainedConfig:
    sizes = {**SIZES, "max_position_embeddings": context, "original_max_position_embeddings": CONTEXT}
    return Phi3Config(**sizes, rope_parameters=dict(BY_LENGTH))


def dynamic() -> PreTrainedConfig:
    return LlamaConfig(**SIZES, max_position_embeddings=CONTEXT, rope_parameters=dict(STRETCHED))


@pytest.fixture
def loaded(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedConfig], Model]:
    def made(config: PreTrainedConfig) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return load(str(tmp_path / "base"), World())

    return made


def row(length: int) -> Example:
    weights = (np.arange(length) >= length // 2).astype(np.float32)
    return Example(tokens=np.random.default_rng(length).integers(3, 290, length), weights=weights, id=f"row{length}")


@torch.no_grad()
def of_transformers(model: Model, example: Example) -> float:
    """Oracle: the loss of a row alone in transformers' own forward pass."""
    plain = AutoModelForCausalLM.from_pretrained(model.vocabulary.folder, attn_implementation="eager").eval()
    tokens = torch.from_numpy(example.tokens)
    log_probs = torch.log_softmax(plain(tokens[None], use_cache=False).logits[0, :-1], -1)
    return float(-(log_probs.gather(1, tokens[1:, None])[:, 0] * torch.from_numpy(example.weights)[1:]).sum())


def answers(model: Model, *prompts: np.ndarray) -> list[list[int]]:
    found = sample(model, prompts, Sampling(max_new_tokens=20))
    return [one.tokens.tolist() for one in found]


@pytest.mark.parametrize("config", [longrope(512), dynamic()], ids=["longrope", "dynamic"])
def test_a_row_and_its_answer_are_the_same_alone_and_beside_a_long_row(
    config: PreTrainedConfig, loaded: Callable[[PreTrainedConfig], Model]
) -> None:
    model = loaded(config)
    beside, _ = example_losses(model, [row(LONG), row(SHORT)])
    assert beside[1] == pytest.approx(of_transformers(model, row(SHORT)), abs=1e-3)
    for short in (row(SHORT).tokens, row(CONTEXT - 10).tokens):  # the second goes past the context
        assert answers(model, row(LONG).tokens, short)[1:] == answers(model, short)


def test_longrope_packs_rows_of_its_shorter_length_and_says_that_it_takes_no_longer_ones(
    loaded: Callable[[PreTrainedConfig], Model],
) -> None:
    model = loaded(longrope(512))
    assert model.packs
    assert model.vocabulary.context_tokens == CONTEXT
    assert "up to 64 tokens" in model.notes[0]
    rows = [row(CONTEXT), row(SHORT)]
    found, _ = example_losses(model, rows)
    assert found == pytest.approx([of_transformers(model, one) for one in rows], abs=1e-3)


def test_longrope_of_one_length_has_all_of_it(loaded: Callable[[PreTrainedConfig], Model]) -> None:
    model = loaded(longrope(CONTEXT))
    assert model.packs
    assert model.notes == ()
    assert model.vocabulary.context_tokens == CONTEXT


def test_dynamic_turns_pack_and_stay_those_of_the_context_with_a_note(
    loaded: Callable[[PreTrainedConfig], Model],
) -> None:
    model = loaded(dynamic())
    assert model.packs
    assert "64 tokens" in model.notes[0]


def test_a_model_that_turns_alike_at_every_length_has_no_note(tiny_model: Model) -> None:
    assert isinstance(tiny_model.hf, LlamaForCausalLM)
    assert tiny_model.packs
    assert tiny_model.notes == ()
