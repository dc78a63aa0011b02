"""The learning rate is a pure function of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.train.optim import Optimization, learning_rate


def rates(steps: int, **values: object) -> list[float]:
    how = Optimization(learning_rate=1.0, **values)  # type: ignore[arg-type]
    return [learning_rate(step, steps, how) for step in range(steps)]


def test_linear_rises_to_the_peak_and_falls_to_the_last_step() -> None:
    assert rates(8, warmup=0.25) == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_falls_along_half_a_wave() -> None:
    wanted = [0.5, 1.0, *[0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]]
    assert rates(8, warmup=0.25, schedule="cosine") == pytest.approx(wanted)


def test_constant_stays_at_the_peak() -> None:
    assert rates(8, warmup=0.25, schedule="constant") == pytest.approx([0.5] + [1.0] * 7)


def test_a_run_of_one_step_uses_the_peak() -> None:
    assert rates(1) == [1.0]


@given(st.integers(1, 400), st.floats(0, 0.99), st.sampled_from(["linear", "cosine", "constant"]))
def test_every_schedule_rises_once_to_the_peak_and_never_leaves_zero_to_peak(
    steps: int, warmup: float, schedule: str
) -> None:
    found = rates(steps, warmup=warmup, schedule=schedule)
    top = found.index(max(found))
    assert found[top] == pytest.approx(1.0)
    assert all(0 < rate <= 1 + 1e-9 for rate in found)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found[top:]))
