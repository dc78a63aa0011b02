"""Supervised fine-tuning: every row once an epoch, the loss of the formula, and a model that learns."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tunesmith.data.pack import pack_one
from tunesmith.data.render import render
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.model.sample import Sampling, sample
from tunesmith.model.score import score
from tunesmith.tensors import Scores
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Conversation, Example, Message
from tunesmith.world import World

NEXT_LETTER = str.maketrans("ABCDEFGH", "BCDEFGHA")


def rows(count: int) -> list[Example]:
    draw = np.random.default_rng(0)
    sizes = draw.integers(2, 9, count)
    return [
        Example(tokens=draw.integers(3, 99, size), weights=np.ones(size, dtype=np.float32), id=str(n))
        for n, size in enumerate(sizes)
    ]


def source(examples: Sequence[Example], *, batch: int, epochs: float, world: World | None = None) -> SftSteps:
    return SftSteps(examples, batch=batch, epochs=epochs, budget_tokens=20, world=world or World(), seed=3)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_every_row_comes_once_an_epoch(count: int, batch: int, epochs: int) -> None:
    steps = source(rows(count), batch=batch, epochs=float(epochs))
    order = [row for step in range(steps.steps) for row in steps.rows(step)]
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert len(order) - epochs * count < batch  # the last step is filled from the next epoch


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    examples = rows(30)
    first = [source(examples, batch=6, epochs=2.0).rows(step) for step in range(10)]
    backwards = source(examples, batch=6, epochs=2.0)
    assert [backwards.rows(step) for step in reversed(range(10))] == first[::-1]
    assert functools.reduce(operator.iadd, first[:5], []) != functools.reduce(operator.iadd, first[5:], [])
    other = SftSteps(examples, batch=6, epochs=2.0, budget_tokens=20, world=World(), seed=4)
    assert other.rows(0) != first[0]


@given(st.integers(1, 4), st.integers(4, 9))
def test_ranks_share_each_step_without_overlap(size: int, batch: int) -> None:
    examples = rows(25)
    whole = source(examples, batch=batch, epochs=1.0)
    for step in range(whole.steps):
        parts = [
            name
            for rank in range(size)
            for packed in source(examples, batch=batch, epochs=1.0, world=World(rank=rank, size=size))(step)
            for name in packed.ids
        ]
        assert Counter(parts) == Counter(examples[row].id for row in whole.rows(step))


def test_steps_are_counted_up_from_epochs_and_capped() -> None:
    assert source(rows(10), batch=4, epochs=1.0).steps == 3
    assert source(rows(10), batch=4, epochs=0.1).steps == 1
    assert source(rows(10), batch=64, epochs=2.0).steps == 2
    capped = SftSteps(rows(10), batch=4, epochs=9.0, budget_tokens=20, world=World(), max_steps=5)
    assert capped.steps == 5


def test_the_loss_is_the_weighted_negative_log_likelihood_as_a_sum() -> None:
    example = Example(tokens=np.arange(5), weights=np.array([0, 1, 0, 0.5, 2], dtype=np.float32), id="r")
    batch = pack_one([example])
    log_probs = torch.tensor([-1.0, -2.0, -3.0])
    assert CrossEntropy().count(batch) == 3.5
    assert float(CrossEntropy()(Scores(parts={"log_probs": log_probs}), batch).sum) == 1.0 + 0.5 * 2 + 2 * 3


@torch.no_grad()
def judged(model: Model, examples: Sequence[Example]) -> tuple[float, float]:
    """Loss per trained token and share of exact answers on held-out rows."""
    batch = pack_one(examples)
    prompts = [example.tokens[: int(np.flatnonzero(example.weights)[0])] for example in examples]
    answers = [example.tokens[example.weights > 0].tolist() for example in examples]
    found = sample(model, prompts, Sampling(max_new_tokens=6))
    right = [one.tokens.tolist() == answer for one, answer in zip(found, answers, strict=True)]
    return -float(score(model, batch).log_probs.mean()), sum(right) / len(right)


def shifted(example: Example, tokenizer: PreTrainedTokenizerFast) -> Example:
    """The same question, with the next letter of the alphabet for each letter of the answer."""
    word = tokenizer.decode(example.tokens[example.weights > 0].tolist(), skip_special_tokens=True)
    asked = Message(role="user", content=f"Upper case of: {word.lower()}")
    turns = (asked, Message(role="assistant", content=word.translate(NEXT_LETTER)))
    return render(Conversation(messages=turns, id=example.id, source=""), tokenizer, [2])[0]


def learn(model: Model, examples: Sequence[Example], epochs: float, rate: float, folder: Path) -> None:
    steps = SftSteps(examples, batch=16, epochs=epochs, budget_tokens=4096, world=World())
    for _ in fit(model, steps, CrossEntropy(), Optimization(learning_rate=rate), folder, World()):
        pass


@pytest.fixture(scope="module")
def wrong_base(
    tiny_model_folder: Path,
    tiny_examples: list[Example],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, torch.Tensor]:
    """Weights of a base model that can do something: every letter of its answers is one too far."""
    model = load(str(tiny_model_folder), World())
    rows = [shifted(example, tiny_tokenizer) for example in tiny_examples]
    learn(model, rows, 25.0, 5e-3, tmp_path_factory.mktemp("base"))
    return model.hf.state_dict()


@pytest.mark.parametrize(("update", "rate"), [("lora", 1e-2), ("full", 5e-3)])
def test_training_lowers_validation_loss_and_raises_exact_match(
    update: str,
    rate: float,
    wrong_base: dict[str, torch.Tensor],
    fresh_model: Model,
    tiny_examples: list[Example],
    tmp_path: Path,
) -> None:
    train, valid = tiny_examples[:96], tiny_examples[96:]
    fresh_model.hf.load_state_dict(wrong_base)
    if update == "lora":
        attach_lora(fresh_model.hf, LoraShape(rank=16, alpha=32.0), head=fresh_model.head)
    before = judged(fresh_model, valid)
    learn(fresh_model, train, 20.0, rate, tmp_path)
    after = judged(fresh_model, valid)
    assert before[1] < 0.3
    assert after[0] < before[0] / 4
    assert after[1] >= 0.6
