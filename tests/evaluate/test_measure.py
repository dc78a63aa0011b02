"""What a model makes of given answers is what its own forward pass, one row at a time, says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tunesmith.evaluate.measure import choice_accuracies, completion_losses, group_losses
from tunesmith.evaluate.systems import Prompting
from tunesmith.model.load import Model
from tunesmith.types import Example, Item, Message

CHOICES = ("a boat", "nothing of the kind", "two", "a boat house")
ITEMS = [
    Item(
        id=str(number),
        prompt=(Message(role="user", content=f"{'very ' * number}long questions have which answer?"),),
        reference=CHOICES[number % 4],
        choices=CHOICES,
    )
    for number in range(6)
]
PLAIN = Prompting(name="base")


def alone(model: LlamaForCausalLM, example: Example) -> float:
    """Summed negative log-likelihood by transformers' own forward pass."""
    with torch.no_grad():
        logits = model(torch.from_numpy(example.tokens)[None], use_cache=False).logits[0].double()
    said = torch.log_softmax(logits, -1)[:-1].gather(1, torch.from_numpy(example.tokens)[1:, None])[:, 0].numpy()
    return float(-(said * example.weights[1:]).sum())


def test_groups_of_any_size_lose_what_their_examples_lose_alone(
    tiny_model: Model, tiny_model_folder: Path, tiny_examples: list[Example]
) -> None:
    plain = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    groups = [tiny_examples[:3], tiny_examples[3:4], tiny_examples[4:9]]
    sums, counts = group_losses(tiny_model, groups)
    flat = [example for group in groups for example in group]
    assert counts.tolist() == [example.weights[1:].sum() for example in flat]
    assert sums == pytest.approx([alone(plain, example) for example in flat], abs=1e-4)


def test_the_choice_that_is_likeliest_per_token_is_taken(tiny_model: Model) -> None:
    likeliest = []
    for item in ITEMS:
        each = [Item(id=f"{item.id}-{text}", prompt=item.prompt, reference=text, choices=()) for text in item.choices]
        likeliest.append(item.choices[int(np.argmin(completion_losses(tiny_model, PLAIN, each)))])
    expected = [float(best == item.reference) for best, item in zip(likeliest, ITEMS, strict=True)]
    assert choice_accuracies(tiny_model, PLAIN, ITEMS).tolist() == expected
