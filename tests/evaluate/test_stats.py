"""Intervals hold what they promise, and tests agree with scipy.

The coverage of Tango's interval is exact: a sum over all outcomes, no simulation.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tunesmith.errors import DataError
from tunesmith.evaluate import stats
from tunesmith.types import Contrast, Measurement

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
LEVELS = st.sampled_from([0.8, 0.9, 0.95, 0.99])
SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=30)
BINARY_PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)
quick = settings(max_examples=30)


def measurement(arm: str, scores: list[float], ids: list[str] | None = None, metric: str = "m") -> Measurement:
    zeros = np.zeros(len(scores), dtype=np.int64)
    return Measurement(
        arm=arm,
        ids=tuple(ids or [f"row{place}" for place in range(len(scores))]),
        answers=("",) * len(scores),
        scores={metric: np.array(scores, dtype=np.float64)},
        prompt_tokens=zeros,
        completion_tokens=zeros,
        seconds=0.0,
    )


def compare(pairs: list[tuple[float, float]], metric: str = "m") -> Contrast:
    a, b = (
        measurement(arm, list(scores), metric=metric)
        for arm, scores in zip("ab", zip(*pairs, strict=True), strict=True)
    )
    return stats.contrast(a, b, metric)


@given(COUNTS, LEVELS)
def test_wilson_equals_scipys(counts: tuple[int, int], level: float) -> None:
    expected = scipy_stats.binomtest(*counts).proportion_ci(level, method="wilson")
    assert stats.wilson(*counts, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test_on_the_discordant_pairs(only_a: int, only_b: int) -> None:
    differing = only_a + only_b
    expected = scipy_stats.binomtest(only_a, differing).pvalue if differing else 1.0
    assert stats.mcnemar(only_a, only_b) == pytest.approx(expected)


def test_tango_gives_the_published_limits() -> None:
    # Airway reactivity before and after transplantation: 1 against 7 of 21 (Fagerland et al. 2014).
    assert stats.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@given(COUNTS, st.floats(0, 1), LEVELS)
def test_tango_flips_exactly_and_holds_the_difference(counts: tuple[int, int], part: float, level: float) -> None:
    only_a, n = counts
    only_b = int(part * (n - only_a))
    low, high = stats.tango(only_a, only_b, n, level)
    assert -1 <= low <= (only_a - only_b) / n <= high <= 1
    assert stats.tango(only_b, only_a, n, level) == (-high, -low)
    assert low < high


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_tango_excludes_0_where_mcnemars_score_test_rejects(only_a: int, only_b: int, equal: int) -> None:
    low, high = stats.tango(only_a, only_b, only_a + only_b + equal)
    z = (only_a - only_b) / math.sqrt(only_a + only_b) if only_a + only_b else 0.0
    assert (low > 0 or high < 0) == (abs(z) > scipy_stats.norm.ppf(0.975))


def test_tango_keeps_a_width_without_a_discordant_pair() -> None:
    z = scipy_stats.norm.ppf(0.975)
    assert stats.tango(0, 0, 200)[1] == pytest.approx(z**2 / (200 + z**2))


@functools.cache
def cached_tango(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    return stats.tango(only_a, only_b, n)


@pytest.mark.parametrize(
    ("n", "share_a", "share_b"),
    [(50, 0.15, 0.15), (50, 0.3, 0.05), (50, 0.02, 0.02), (200, 0.06, 0.02), (200, 0.02, 0.02)],
)
def test_tangos_95_percent_interval_covers_the_true_difference(n: int, share_a: float, share_b: float) -> None:
    truth, covered = share_a - share_b, 0.0
    a_counts = range(*(int(scipy_stats.binom.ppf(q, n, share_a)) + extra for q, extra in ((1e-5, 0), (1 - 1e-5, 1))))
    for only_a in a_counts:
        chance_a = scipy_stats.binom.pmf(only_a, n, share_a)
        chances_b = scipy_stats.binom.pmf(range(n - only_a + 1), n - only_a, share_b / (1 - share_a))
        for only_b in np.flatnonzero(chances_b > 1e-5):
            low, high = cached_tango(only_a, int(only_b), n)
            covered += chance_a * chances_b[only_b] * (low <= truth <= high)
    assert 0.945 <= covered <= 0.99


def test_the_bootstrap_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 400)
    monkeypatch.setattr(stats, "CHUNK_NUMBERS", 70)
    values = np.array([0.1, 0.5, 0.9, 0.4, 0.4, 0.0, 1.0])
    rng, means = np.random.default_rng(3), []
    for _ in range(400 // 10):  # ten rows of seven values fill a chunk
        for places in rng.integers(7, size=(10, 7)):
            means.append(sum(float(values[place]) for place in places) / 7)
    tail = scipy_stats.norm.cdf(-math.sqrt(7 / 6) * scipy_stats.t.ppf(0.975, 6))
    expected = np.quantile(means, tail), np.quantile(means, 1 - tail)
    assert stats.bootstrap(values, 0.95, seed=3) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_is_as_wide_as_students_interval_on_symmetric_scores() -> None:
    values = np.random.default_rng(0).normal(size=20)
    low, high = stats.bootstrap(values)
    expected = scipy_stats.t.interval(0.95, 19, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("n", [20, 50])
def test_the_bootstraps_95_percent_interval_covers_a_skewed_mean(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    draws = np.random.default_rng(n).beta(0.5, 1.5, size=(600, n))  # like token F1: many near 0, mean 1/4
    inside = [low <= 0.25 <= high for low, high in (stats.bootstrap(row, seed=k) for k, row in enumerate(draws))]
    assert 0.92 <= np.mean(inside) <= 0.98


@quick
@given(SCORES, LEVELS)
def test_an_estimate_lies_in_its_interval_and_repeats(scores: list[float], level: float) -> None:
    found = stats.estimate(scores, level, seed=1)
    assert found.low <= found.value <= found.high
    assert (found.n, found.level, found.value) == (len(scores), level, pytest.approx(np.mean(scores)))
    assert stats.estimate(scores, level, seed=1) == found


def test_scores_of_0_and_1_get_wilsons_interval() -> None:
    found = stats.estimate([1.0, 0.0, 1.0, 1.0])
    assert (found.low, found.high) == stats.wilson(3, 4)


@quick
@given(PAIRS | BINARY_PAIRS)
def test_swapping_the_arms_flips_the_contrast_exactly(pairs: list[tuple[float, float]]) -> None:
    one, other = compare(pairs), compare([(b, a) for a, b in pairs])
    assert one.p_value == other.p_value
    flipped = -one.difference.value, -one.difference.high, -one.difference.low
    assert (other.difference.value, other.difference.low, other.difference.high) == flipped
    assert one.difference.low <= one.difference.value <= one.difference.high
    assert 0 < one.p_value <= 1


@quick
@given(PAIRS | BINARY_PAIRS, st.integers(1, 20))
def test_items_on_which_the_arms_agree_change_no_p_value(pairs: list[tuple[float, float]], more: int) -> None:
    assert compare(pairs).p_value == compare(pairs + [(1.0, 1.0)] * more).p_value


@quick
@given(BINARY_PAIRS)
def test_binary_contrasts_use_tango_and_mcnemar(pairs: list[tuple[float, float]]) -> None:
    only_a, only_b = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
    found = compare(pairs)
    assert (found.difference.low, found.difference.high) == pytest.approx(stats.tango(only_a, only_b, len(pairs)))
    assert found.p_value == stats.mcnemar(only_a, only_b)


def test_permutation_agrees_with_all_sign_patterns() -> None:
    differences = np.array([0.3, -0.1, 0.2, 0.7, 0.05, -0.2, 0.4, 0.1])
    observed = abs(differences.sum())
    patterns = itertools.product((-1, 1), repeat=len(differences))
    exact = np.mean([abs(np.dot(signs, differences)) >= observed - 1e-12 for signs in patterns])
    assert stats.permutation(differences) == pytest.approx(exact, abs=0.01)


def test_permutation_of_0_1_differences_is_mcnemar() -> None:
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 20)
    assert stats.permutation(differences) == pytest.approx(stats.mcnemar(9, 2), abs=0.01)


def test_contrasts_of_different_items_are_refused_by_name() -> None:
    one = measurement("lora", [1.0, 0.0], ["r1", "r2"])
    with pytest.raises(DataError, match="item 2 is r2 for lora and r3 for base"):
        stats.contrast(one, measurement("base", [1.0, 0.0], ["r1", "r3"]), "m")
    with pytest.raises(DataError, match="lora answered 2 items, base 1"):
        stats.contrast(one, measurement("base", [1.0], ["r1"]), "m")
    with pytest.raises(DataError, match="lora has no bleu\nIts metrics: m"):
        stats.contrast(one, one, "bleu")


def test_scores_that_are_absent_or_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="no scores"):
        stats.estimate([])
    with pytest.raises(DataError, match="number 2 of the scores is nan"):
        stats.estimate([1.0, math.nan])


def simulated_power(n: int, difference: float, discordance: float) -> float:
    """How often McNemar's score test finds a gain of this size, of 20,000 test sets."""
    discordance = max(discordance, difference)
    shares = [(discordance + difference) / 2, max(0.0, (discordance - difference) / 2), 1 - discordance]
    only_a, only_b, _ = np.random.default_rng(0).multinomial(n, shares, size=20_000).T
    z = (only_a - only_b) / np.sqrt(np.maximum(1, only_a + only_b))
    return float(np.mean(z > scipy_stats.norm.ppf(0.975)))


@pytest.mark.parametrize(("n", "discordance"), [(100, 0.3), (400, 0.2), (20, 0.05)])
def test_the_smallest_difference_is_found_in_4_runs_of_5(n: int, discordance: float) -> None:
    difference = stats.smallest_difference(n, discordance=discordance)
    # Counts are lumpy: on 20 rows the normal approximation behind the formula errs on the safe side.
    assert simulated_power(n, difference, discordance) >= 0.75 > simulated_power(n, 0.6 * difference, discordance)


def test_the_smallest_mean_difference_is_found_in_4_runs_of_5() -> None:
    difference = stats.smallest_difference(30, sd=2.0)
    draws = np.random.default_rng(0).normal(difference, 2.0, size=(5000, 30))
    p_values = np.asarray(scipy_stats.ttest_1samp(draws, 0, axis=1)[1])
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.03)


def test_the_table_of_the_docs_is_current() -> None:
    row = " | ".join(f"{100 * stats.smallest_difference(n):.1f}" for n in (20, 50, 100, 200, 500, 1000))
    assert f"| {row} |" in (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")


def test_more_rows_show_smaller_differences() -> None:
    found = [stats.smallest_difference(n) for n in range(1, 300)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0


@pytest.mark.parametrize(("won", "lost"), [(176, 24), (16, 0)])
def test_a_win_rate_without_ties_has_wilsons_interval(won: int, lost: int) -> None:
    found = stats.win_rate(np.repeat([1.0, 0.0], [won, lost]))
    assert (found.low, found.high) == pytest.approx(stats.wilson(won, won + lost))
    assert found.value == won / (won + lost)


def test_a_win_rate_of_ties_alone_is_not_known_to_be_one_half() -> None:
    found = stats.win_rate(np.full(50, 0.5))
    assert (found.low, found.value, found.high) == pytest.approx((0.464, 0.5, 0.536), abs=1e-3)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-5, 5)), min_size=1, max_size=30))
def test_one_each_is_the_mean_of_each_group_in_order_of_appearance(pairs: list[tuple[str, float]]) -> None:
    by_group: dict[str, list[float]] = {}
    for group, value in pairs:
        by_group.setdefault(group, []).append(value)
    found = stats.one_each(np.array([value for _, value in pairs]), [group for group, _ in pairs])
    assert found.tolist() == pytest.approx([sum(values) / len(values) for values in by_group.values()])
