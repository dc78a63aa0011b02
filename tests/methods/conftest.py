"""What the tests of methods share: rows and pairs, and what the model's own forward pass says of one row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.model.load import Model
    from tunesmith.types import Example

END = 2
Pair = tuple["Example", "Example"]


@pytest.fixture
def head_model(fresh_model: Model) -> Model:
    """The tiny model with a scalar head that says something, all of it trained."""
    import torch

    from tunesmith.model.values import attach_value_head

    head = attach_value_head(fresh_model, seed=1)
    with torch.no_grad():
        head.bias.fill_(0.3)
    return fresh_model


@pytest.fixture(scope="session")
def answers() -> Callable[..., list[Pair]]:
    """Makes pairs of answers of different lengths: all prompts begin alike, and those of a pair are one."""
    from tunesmith.types import Example

    def example(prompt: np.ndarray, answer: np.ndarray, name: str) -> Example:
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer) + 1)]).astype(np.float32)
        return Example(tokens=np.concatenate([prompt, answer, [END]]), weights=weights, id=name)

    def make(count: int, seed: int = 0, stem: int = 12) -> list[Pair]:
        draw = np.random.default_rng(seed)
        start = draw.integers(3, 250, stem)
        pairs = []
        for n in range(count):
            prompt = np.concatenate([start, draw.integers(3, 250, int(draw.integers(9, 16)))])
            sides = [draw.integers(3, 250, int(draw.integers(1, 7))) for _ in range(2)]
            pairs.append((example(prompt, sides[0], f"{n}+"), example(prompt, sides[1], f"{n}-")))
        return pairs

    return make


@pytest.fixture(scope="session")
def plain_hidden() -> Callable[[Model, np.ndarray], Tensor]:
    """The last hidden state [T D] of one row alone, by the model's own attention."""
    import torch

    from tunesmith.model.attention import NAME

    def hidden(model: Model, tokens: np.ndarray) -> Tensor:
        model.hf.set_attn_implementation("eager")
        try:
            return model.body(input_ids=torch.from_numpy(tokens)[None], use_cache=False).last_hidden_state[0]
        finally:
            model.hf.set_attn_implementation(NAME)

    return hidden


@pytest.fixture(scope="session")
def plain_log_probs(plain_hidden: Callable[[Model, np.ndarray], Tensor]) -> Callable[[Model, Example], Tensor]:
    """Log-probabilities of one row's trained tokens."""
    import torch

    def log_probs(model: Model, row: Example) -> Tensor:
        logits = plain_hidden(model, row.tokens)[:-1] @ model.head_weight.T
        chosen = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(row.tokens)[1:, None])[:, 0]
        return chosen[torch.from_numpy(np.flatnonzero(row.weights[1:]))]

    return log_probs
