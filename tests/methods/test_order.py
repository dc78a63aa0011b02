"""Whole groups an epoch, in an order that depends on nothing but seed and epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import TrainingError
from tunesmith.methods.order import Alone, EpochSteps, shuffled
from tunesmith.methods.sft import SftSteps
from tunesmith.types import Example
from tunesmith.world import World

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]


def steps(groups: Pairs, *, world: World | None = None, **how: object) -> EpochSteps:
    settings = {"batch": 3, "epochs": 2.0, "budget_tokens": 90, "seed": 5, **how}
    return EpochSteps(groups, world=world or World(), **settings)  # type: ignore[arg-type]


def pairs_of(ids: tuple[str, ...]) -> list[str]:
    """Names of the pairs of a batch, whose sides must stand side by side."""
    assert [one[-1] for one in ids] == ["+", "-"] * (len(ids) // 2)
    assert [one[:-1] for one in ids[::2]] == [one[:-1] for one in ids[1::2]]
    return [one[:-1] for one in ids[::2]]


@pytest.mark.parametrize("packs", [True, False])
def test_every_pair_comes_once_an_epoch_with_its_sides_together(packs: bool, answers: Makes) -> None:
    source = steps(answers(12), packs=packs)
    assert source.steps == 8
    for epoch in range(2):
        seen = [
            name for step in range(4 * epoch, 4 * epoch + 4) for batch in source(step) for name in pairs_of(batch.ids)
        ]
        assert sorted(seen, key=int) == [str(n) for n in range(12)]


def test_a_model_that_cannot_pack_gets_a_pair_a_stream_and_nothing_shared(answers: Makes) -> None:
    for batch in steps(answers(6), packs=False)(0):
        assert len(batch.ids) == 2
        assert batch.layout.parents == (-1, -1)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(4, 9))
def test_ranks_share_the_pairs_of_a_step(answers: Makes, size: int, batch: int) -> None:
    groups = answers(10)
    whole = steps(groups, batch=batch)
    for step in range(whole.steps):
        parts = Counter(
            name
            for rank in range(size)
            for packed in steps(groups, batch=batch, world=World(rank=rank, size=size))(step)
            for name in pairs_of(packed.ids)
        )
        assert parts == Counter(str(place) for place in whole.rows(step))


def test_more_processes_than_pairs_in_a_step_are_refused(answers: Makes) -> None:
    with pytest.raises(TrainingError, match=r"train\.batch: 4 processes cannot share steps of 3 examples"):
        steps(answers(8), world=World(rank=0, size=4))


def test_pairs_come_in_the_order_that_single_rows_would(answers: Makes) -> None:
    groups = answers(7)
    alone = SftSteps([chosen for chosen, _ in groups], batch=3, epochs=2.0, budget_tokens=90, world=World(), seed=5)
    assert [steps(groups).rows(step) for step in range(5)] == [alone.rows(step) for step in range(5)]
    assert len(Alone([chosen for chosen, _ in groups])) == 7


def test_every_batch_is_finished_as_the_method_asks(answers: Makes) -> None:
    plain, moved = (
        steps(answers(6), finish=finish)(1)
        for finish in (lambda batch: batch, lambda batch: replace(batch, index=batch.index + 1))
    )
    assert [batch.index.add(1).tolist() for batch in plain] == [batch.index.tolist() for batch in moved]


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 40))
def test_an_order_is_a_permutation_that_seed_and_epoch_alone_decide(seed: int, epoch: int, size: int) -> None:
    order = shuffled(seed, epoch, size).tolist()
    assert sorted(order) == list(range(size))
    assert shuffled(seed, epoch, size).tolist() == order
    if size > 20:
        assert shuffled(seed + 1, epoch, size).tolist() != order
        assert shuffled(seed, epoch + 1, size).tolist() != order
