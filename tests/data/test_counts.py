"""How many tokens Examples have is counted once, and nobody who only asks for that reads them again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tunesmith.data.counts import Counted, counts
from tunesmith.data.store import stored_examples
from tunesmith.methods.economy import reach
from tunesmith.methods.sft import SftSteps
from tunesmith.model.load import Model
from tunesmith.recipe import Update, parse_recipe
from tunesmith.train.plan import Reach, Settings, derive
from tunesmith.types import Example
from tunesmith.world import World


def example(*weights: float) -> Example:
    return Example(tokens=np.arange(len(weights)), weights=np.array(weights, np.float32), id="")


class Watched(Sequence[Example]):
    """Examples that count how often one of them is read."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples, self.reads = examples, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        self.reads += 1
        return self.examples[place]


def test_counts_are_those_of_each_example() -> None:
    found = counts(stored_examples([example(0, 0, 1, 0.5), example(1, 0), example(1, -1, 1)]))
    assert found.tokens.tolist() == [4, 2, 3]
    assert found.trained.tolist() == [2, 1, 2]
    assert found.scored.tolist() == [2, 0, 2]


def test_of_no_examples_there_are_no_counts() -> None:
    assert [column.shape for column in counts([])] == [(0,)] * 3


def test_examples_with_their_counts_are_those_examples() -> None:
    plain = [example(0, 1), example(0, 0, 1)]
    known = Counted(plain, counts(plain))
    assert list(known) == plain
    assert list(known[1:]) == plain[1:]
    assert counts(known) is known.counts


@pytest.mark.parametrize("update", ["lora", "full", "economy"])
def test_plan_and_order_read_no_example_for_its_length(
    update: Update, tiny_model: Model, tiny_examples: list[Example]
) -> None:
    watched = Watched(tiny_examples)
    recipe = parse_recipe({"data": {"train": "rows.jsonl"}})

    def asked(examples: Sequence[Example]) -> tuple[Settings, list[float], Reach]:
        source = SftSteps(examples, batch=16, epochs=1.0, budget_tokens=512, world=World())
        return derive(recipe, update, tiny_model, examples), source.row_tokens(), reach(source, tiny_model)

    assert asked(Counted(watched, counts(tiny_examples))) == asked(tiny_examples)
    assert watched.reads < len(tiny_examples)  # the type checker of tests looks at a few
