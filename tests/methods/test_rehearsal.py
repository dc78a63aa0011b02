"""Rehearsal: texts of the base's own, a loss that is nothing before training, and less distance from the base after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tunesmith.data.pack import pack_one
from tunesmith.methods.rehearsal import BASE, Rehearsal, own_texts
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model, load
from tunesmith.model.score import score
from tunesmith.tensors import Batch
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World


@pytest.fixture(scope="module")
def texts(tiny_model: Model) -> list[Example]:
    return own_texts(tiny_model, 6, seed=0)


def steps(
    examples: Sequence[Example], texts: Sequence[Example], strength: float, batch: int = 4, world: World | None = None
) -> SftSteps:
    rehearsal = Rehearsal(texts=texts, strength=strength)
    how = {"batch": batch, "epochs": 1.0, "budget_tokens": 4096, "world": world or World()}
    return SftSteps(examples, rehearsal=rehearsal, **how)


def is_text(batch: Batch) -> bool:
    return all(name.startswith("rehearsal") for name in batch.ids)


def test_texts_are_the_same_for_the_same_seed_and_begin_each_in_its_own_way(
    tiny_model: Model, texts: list[Example]
) -> None:
    again, other = own_texts(tiny_model, 6, seed=0), own_texts(tiny_model, 6, seed=1)
    assert [text.tokens.tolist() for text in again] == [text.tokens.tolist() for text in texts]
    assert [text.tokens.tolist() for text in other] != [text.tokens.tolist() for text in texts]
    assert len({int(text.tokens[0]) for text in texts}) > 3
    assert not {int(text.tokens[0]) for text in texts} & set(tiny_model.tokenizer.all_special_ids)


def test_a_text_carries_the_log_probabilities_that_the_base_gives_it(tiny_model: Model, texts: list[Example]) -> None:
    for text in texts:
        with torch.no_grad():
            given = score(tiny_model, pack_one([text])).log_probs.numpy()
        assert text.extra[BASE][1:] == pytest.approx(given, abs=1e-4)


def test_before_the_first_step_rehearsal_costs_nothing_and_the_rows_cost_what_they_did(
    tiny_model: Model, tiny_examples: list[Example], texts: list[Example]
) -> None:
    loss = CrossEntropy()
    with torch.no_grad():
        found = [
            (batch, float(loss(score(tiny_model, batch), batch).sum)) for batch in steps(tiny_examples, texts, 1.0)(0)
        ]
        plain = [float(loss(score(tiny_model, batch), batch).sum) for batch in steps(tiny_examples, (), 0.0)(0)]
    rehearsed = [value for batch, value in found if is_text(batch)]
    assert len(rehearsed) == 1
    assert abs(rehearsed[0]) < 1e-2
    assert [value for batch, value in found if not is_text(batch)] == plain


def test_the_gradient_is_that_of_two_means_by_the_models_own_forward(
    tiny_model_folder: Path, tiny_examples: list[Example], texts: list[Example]
) -> None:
    strength, loss = 0.7, CrossEntropy()
    model, plain = load(str(tiny_model_folder), World()), LlamaForCausalLM.from_pretrained(tiny_model_folder)
    source = steps(tiny_examples, texts, strength)
    batches = source(0)
    total = sum(loss.count(batch) for batch in batches)
    for batch in batches:
        (loss(score(model, batch), batch).sum / total).backward()

    def mean(examples: Sequence[Example]) -> torch.Tensor:
        said = []
        for example in examples:
            tokens = torch.from_numpy(example.tokens)
            log_probs = torch.log_softmax(plain(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
            said.append(log_probs[torch.from_numpy(example.weights[1:] > 0)])
        return -torch.cat(said).mean()

    rehearsed = {name for batch in batches if is_text(batch) for name in batch.ids}
    own = [text for text in texts if text.id in rehearsed]
    (mean([tiny_examples[row] for row in source.rows(0)]) + strength * mean(own)).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in trainable(model.hf).items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name


@given(st.integers(1, 3), st.integers(4, 20))
def test_every_step_has_one_text_for_eight_rows_and_ranks_share_them(size: int, batch: int) -> None:
    draw = np.random.default_rng(0)
    plain = [
        Example(tokens=draw.integers(3, 99, 9), weights=np.ones(9, dtype=np.float32), id=f"row {n}") for n in range(20)
    ]
    own = [
        Example(
            tokens=draw.integers(3, 99, 9),
            weights=np.ones(9, dtype=np.float32),
            id=f"rehearsal {n}",
            extra={BASE: np.zeros(9, dtype=np.float32)},
        )
        for n in range(5)
    ]
    seen: Counter[str] = Counter()
    whole = steps(plain, own, 1.0, batch)
    for step in range(whole.steps):
        ranks = [steps(plain, own, 1.0, batch, World(rank=rank, size=size))(step) for rank in range(size)]
        names = Counter(name for packed in ranks for one in packed for name in one.ids)
        wanted = Counter(name for one in whole(step) for name in one.ids)
        assert names == wanted
        own_names = [name for name in names.elements() if name.startswith("rehearsal")]
        assert len(own_names) == max(1, batch // 8)
        seen.update(own_names)
    assert max(seen.values()) - min(seen[text.id] for text in own) <= 1


def test_a_model_that_rehearses_stays_nearer_to_its_base(
    tiny_model_folder: Path, tiny_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    held_out, own = own_texts(tiny_model, 16, seed=5), own_texts(tiny_model, 16, seed=0)

    def distance(strength: float) -> float:
        model, rehearsal = load(str(tiny_model_folder), World()), Rehearsal(texts=own, strength=strength)
        how = {"batch": 16, "epochs": 4.0, "budget_tokens": 4096, "world": World()}
        source, rate = SftSteps(tiny_examples, rehearsal=rehearsal, **how), Optimization(learning_rate=3e-3)
        for _ in fit(model, source, CrossEntropy(), rate, tmp_path / str(strength), World()):
            pass
        with torch.no_grad():
            batches = [pack_one([text]) for text in held_out]
            return float(np.mean([float((b.extra[BASE] - score(model, b).log_probs).mean()) for b in batches]))

    assert distance(1.0) < distance(0.0) / 2
