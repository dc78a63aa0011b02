"""Krippendorff's alpha: published examples, a plain loop over pairs of judgements, and what the interval covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.evaluate.agreement import krippendorff


def plain(units: Sequence[Sequence[object]]) -> float:
    """Alpha by the coincidence matrix, one pair of judgements after the other (Krippendorff 2011, section C)."""
    matrix: dict[tuple[object, object], float] = {}
    for unit in units:
        for i, one in enumerate(unit):
            for j, other in enumerate(unit):
                if i != j:
                    matrix[one, other] = matrix.get((one, other), 0.0) + 1 / (len(unit) - 1)
    margins: dict[object, float] = {}
    for (one, _), count in matrix.items():
        margins[one] = margins.get(one, 0.0) + count
    n = sum(margins.values())
    observed = sum(count for (one, other), count in matrix.items() if one != other)
    expected = sum(margins[one] * margins[other] for one in margins for other in margins if one != other)
    return 1 - (n - 1) * observed / expected


def columns(*raters: str) -> list[list[str]]:
    """Units from one line per rater; a dot is a missing judgement."""
    return [
        [value for value in unit if value != "."] for unit in zip(*(rater.split() for rater in raters), strict=True)
    ]


def test_alpha_is_that_of_krippendorffs_four_observers_with_missing_judgements() -> None:
    units = columns(
        "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."
    )
    found = krippendorff(units)
    assert found is not None
    assert round(found.value, 3) == 0.743
    assert found.n == 11  # the last unit was judged once


def test_alpha_is_that_of_krippendorffs_two_observers() -> None:
    found = krippendorff(columns("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"))
    assert found is not None
    assert round(found.value, 3) == 0.095


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=12))
def test_alpha_is_a_plain_loop_over_pairs_of_judgements(units: list[list[str]]) -> None:
    found = krippendorff(units)
    if len({value for unit in units if len(unit) > 1 for value in unit}) < 2:
        assert found is None
    else:
        assert found is not None
        assert found.value == pytest.approx(plain([unit for unit in units if len(unit) > 1]))
        assert found.low <= found.value <= found.high


def test_full_agreement_is_one_and_no_agreement_beyond_chance_is_near_zero() -> None:
    alike = krippendorff([["a", "a"], ["b", "b"], ["a", "a"]])
    assert alike is not None
    assert (alike.value, alike.low, alike.high) == (1.0, 1.0, 1.0)
    rng = np.random.default_rng(0)
    chance = krippendorff(rng.choice(["a", "b"], size=(400, 2)).tolist())
    assert chance is not None
    assert chance.low < 0 < chance.high
    assert chance.high - chance.low < 0.25


def test_the_same_judgements_give_the_same_interval() -> None:
    units = [["a", "b"], ["b", "b"], ["a", "a"], ["b", "a", "a"]]
    assert krippendorff(units, seed=3) == krippendorff(units, seed=3)
