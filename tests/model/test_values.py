"""The scalar head: part of what is trained, no part of what is handed over, rescaled without changing an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.data.pack import pack_one
from tunesmith.errors import ModelError
from tunesmith.model.adapters import save_model
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.model.score import score
from tunesmith.model.values import (
    FILE,
    attach_value_head,
    load_value_head,
    normalise,
    save_value_head,
    value_head,
    without_value_head,
)
from tunesmith.tensors import Need
from tunesmith.train.checkpoint import load_weights, save_weights, trainable
from tunesmith.types import Example
from tunesmith.world import World

BOTH: frozenset[Need] = frozenset({"log_probs", "values"})


@torch.no_grad()
def values(model: Model, examples: Sequence[Example]) -> torch.Tensor:
    return score(model, pack_one(examples), frozenset({"values"})).values


def test_a_head_starts_at_zero_or_as_the_seed_says(fresh_model: Model, tiny_examples: list[Example]) -> None:
    attach_value_head(fresh_model)
    assert not values(fresh_model, tiny_examples[:3]).any()
    drawn = [attach_value_head(fresh_model, seed=seed).weight.detach().clone() for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    many = torch.cat([attach_value_head(fresh_model, seed=seed).weight.detach() for seed in range(50)])
    assert float(many.std()) == pytest.approx(1 / 65**0.5, rel=0.05)
    assert not value_head(fresh_model.hf).bias.any()


@pytest.mark.parametrize("update", ["lora", "full"])
def test_the_head_is_trained_and_checkpointed_as_any_weight(
    update: str, fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    if update == "lora":
        attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    head = attach_value_head(fresh_model, seed=1)
    batch = pack_one(tiny_examples[:3])
    score(fresh_model, batch, BOTH).values.sum().backward()
    assert {"value_head.weight", "value_head.bias"} <= set(trainable(fresh_model.hf))
    assert head.weight.grad is not None
    assert float(head.bias.grad) == len(batch.targets)  # type: ignore[arg-type]
    assert any(p.grad is not None and p.grad.any() for n, p in trainable(fresh_model.hf).items() if "q_proj" in n)
    before = values(fresh_model, tiny_examples[:3])
    save_weights(fresh_model.hf, tmp_path / "w.safetensors")
    with torch.no_grad():
        head.weight.fill_(9.0)
    load_weights(fresh_model.hf, tmp_path / "w.safetensors")
    assert torch.equal(values(fresh_model, tiny_examples[:3]), before)


def test_both_parts_together_are_each_alone(fresh_model: Model, tiny_examples: list[Example]) -> None:
    attach_value_head(fresh_model, seed=1)
    batch = pack_one(tiny_examples[:5])
    with torch.no_grad():
        both = score(fresh_model, batch, BOTH)
        assert set(score(fresh_model, batch).parts) == {"log_probs"}
        assert torch.equal(both.log_probs, score(fresh_model, batch).log_probs)
        assert torch.equal(both.values, values(fresh_model, tiny_examples[:5]))


def test_a_model_that_cannot_pack_says_the_same_even_where_its_logits_are_scaled(
    fresh_model: Model, tiny_examples: list[Example]
) -> None:
    """Log-probabilities come from the model's own forward pass, as those of sampling do."""
    attach_value_head(fresh_model, seed=1)
    batch = pack_one(tiny_examples[:3], share=False)
    with torch.no_grad():
        packed = score(fresh_model, batch, BOTH)
        fresh_model.hf.set_attn_implementation("eager")
        plain = replace(fresh_model, packs=False)
        torch.testing.assert_close(score(plain, batch, BOTH).values, packed.values, rtol=0, atol=1e-5)
        torch.testing.assert_close(score(plain, batch, BOTH).log_probs, packed.log_probs, rtol=0, atol=1e-5)
        fresh_model.hf.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
        assert torch.equal(score(plain, batch, BOTH).log_probs, score(plain, batch).log_probs)
        assert float((score(plain, batch, BOTH).log_probs - packed.log_probs).abs().max()) > 1e-2


def test_a_model_is_handed_over_without_its_head(fresh_model: Model, tmp_path: Path) -> None:
    names = [name for name, _ in fresh_model.hf.named_parameters()]
    head = attach_value_head(fresh_model, seed=1)
    trained = [name for name, _ in fresh_model.hf.named_parameters()]
    with without_value_head(fresh_model):
        assert [name for name, _ in fresh_model.hf.named_parameters()] == names
        save_model(fresh_model, tmp_path / "model")
    assert value_head(fresh_model.hf) is head
    assert [name for name, _ in fresh_model.hf.named_parameters()] == trained
    again = load(str(tmp_path / "model"), World())
    assert [name for name, _ in again.hf.named_parameters()] == names


def test_the_head_comes_back_when_what_is_done_without_it_fails(fresh_model: Model) -> None:
    head = attach_value_head(fresh_model)
    with pytest.raises(KeyError), without_value_head(fresh_model):
        raise KeyError
    assert value_head(fresh_model.hf) is head


def test_a_saved_head_is_read_back(
    fresh_model: Model, tiny_model_folder: Path, tiny_examples: list[Example], tmp_path: Path
) -> None:
    save_value_head(attach_value_head(fresh_model, seed=4), tmp_path)
    other = load(str(tiny_model_folder), World())
    load_value_head(other, tmp_path)
    assert torch.equal(values(other, tiny_examples[:3]), values(fresh_model, tiny_examples[:3]))


def wider(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1, 99), "bias": torch.zeros(1)}, folder / FILE)


@pytest.mark.parametrize(
    "damage",
    [lambda folder: None, lambda folder: (folder / FILE).write_bytes(b"no"), wider],
    ids=["none", "bad", "wide"],
)
def test_a_head_that_is_missing_damaged_or_of_another_width_is_refused(
    damage,
    fresh_model: Model,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    damage(tmp_path)
    with pytest.raises(ModelError, match="no reward head that fits"):
        load_value_head(fresh_model, tmp_path)


def test_normalised_scores_have_mean_zero_and_variance_one(fresh_model: Model, tiny_examples: list[Example]) -> None:
    attach_value_head(fresh_model, seed=1)
    before = values(fresh_model, tiny_examples[:20]).double().numpy()
    normalise(fresh_model, float(before.mean()), float(before.std()))
    after = values(fresh_model, tiny_examples[:20]).double().numpy()
    assert after.mean() == pytest.approx(0, abs=1e-4)
    assert after.std() == pytest.approx(1, abs=1e-4)
    assert np.argsort(after).tolist() == np.argsort(before).tolist()
