"""What a look at held-out prompts says of the answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling
from tunesmith.pipeline.panel import Panel, look
from tunesmith.types import Item, Message
from tunesmith.world import World


@torch.no_grad()
def log_prob(model: Model, tokens: np.ndarray, answer: int, temperature: float) -> float:
    """Oracle: of the last `answer` tokens, as they are drawn at `temperature`."""
    logits = model.hf(torch.from_numpy(tokens)[None], use_cache=False).logits[0, :-1] / temperature
    chosen = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(tokens)[1:, None])
    return float(chosen[-answer:].sum())


def model_of(folder: Path, packs: bool, sharper: float) -> Model:
    model = load(str(folder), World())
    with torch.no_grad():
        model.body.norm.weight.mul_(sharper)
    if not packs:
        model.hf.set_attn_implementation("eager")
    return replace(model, packs=packs)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_nats_from_the_reference_are_of_what_is_drawn_at_the_temperature(
    temperature: float, packs: bool, tiny_model_folder: Path
) -> None:
    policy, base = (model_of(tiny_model_folder, packs, sharper) for sharper in (6, 1))
    items = tuple(Item(prompt=(Message(role="user", content=f"Q{n}"),), reference="", id=str(n)) for n in range(4))
    panel = Panel(rewards={}, grades={}, decides="", missing_end=-1.0)
    how = Sampling(max_new_tokens=5, temperature=temperature, seed=1)
    seen = look(policy, lambda: nullcontext(base), panel, items, how)
    plain = [model_of(tiny_model_folder, False, sharper) for sharper in (6, 1)]
    for answer, far in zip(seen.answers, seen.kl, strict=True):
        drawn = (answer.example.tokens, len(answer.completion.tokens), temperature)
        mine, theirs = (log_prob(model, *drawn) for model in plain)
        assert far == pytest.approx(mine - theirs, abs=1e-3)
