"""Filler makes passes of few sizes, and changes nothing for the rows before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.pack import pack_one
from tunesmith.model import filler as filling
from tunesmith.model.filler import EXACT_ROWS, filled, filler
from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling, sample
from tunesmith.model.score import score
from tunesmith.tensors import Batch
from tunesmith.types import Example
from tunesmith.world import World

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load(str(tiny_model_folder), World())


@pytest.fixture
def unfilled(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Within its context nothing is filled."""
    with monkeypatch.context() as within:
        within.setattr(filling, "EXACT_ROWS", 10**9)
        yield within


def stream(*lengths: int) -> Batch:
    draw = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths):
        weights = (np.arange(length) >= length // 3).astype(np.float32)
        rows.append(Example(tokens=draw.integers(3, 250, length), weights=weights, id=str(number)))
    return pack_one(rows)


@given(st.integers(1, 10**6))
def test_there_is_at_most_a_sixteenth_of_filler(rows: int) -> None:
    assert 0 <= 16 * filler(rows, CPU) <= rows


def test_streams_of_all_lengths_have_few_sizes() -> None:
    sizes = {rows + filler(rows, CPU) for rows in range(EXACT_ROWS + 1, 4097)}
    assert len(sizes) <= 6 * 16 + 1  # six powers of two
    assert filler(1000, torch.device("cuda")) == 0


@pytest.mark.parametrize("lengths", [(70, 31), (45, 45, 45), (129,), (257, 3)])
def test_log_probabilities_and_gradients_are_those_without_filler(
    lengths: tuple[int, ...], model: Model, unfilled: pytest.MonkeyPatch
) -> None:
    batch = stream(*lengths)

    def scored() -> tuple[torch.Tensor, list[torch.Tensor]]:
        for parameter in model.hf.parameters():
            parameter.grad = None
        found = score(model, batch).log_probs
        (found * batch.weights).sum().backward()
        return found.detach(), [p.grad.clone() for p in model.hf.parameters() if p.grad is not None]

    plain, slopes = scored()
    assert filled(batch) is batch
    unfilled.undo()
    assert len(filled(batch).tokens) > len(batch.tokens)
    padded, padded_slopes = scored()
    assert padded.shape == plain.shape
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded_slopes, slopes, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(score(model, batch).log_probs, plain, rtol=0, atol=1e-5)


def test_answers_are_those_without_filler(model: Model, unfilled: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    shared = draw.integers(3, 250, 67)  # prefilled once, with filler of its own
    prompts = [np.concatenate([shared, draw.integers(3, 250, length)]) for length in (101, 30, 70)]
    plain = sample(model, prompts, Sampling(max_new_tokens=6))
    unfilled.undo()
    assert filler(67, CPU)
    for one, other in zip(sample(model, prompts, Sampling(max_new_tokens=6)), plain, strict=True):
        assert list(one.tokens) == list(other.tokens)
