"""Equivalence is two one-sided tests: the same as done by hand, and wrong at the margin no more often than it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tunesmith.evaluate.stats import equivalence
from tunesmith.evaluate.verdict import decide_equivalence
from tunesmith.types import Contrast, Equivalence, Estimate, Measurement

N = 300


def measurement(arm: str, scores: np.ndarray, metric: str) -> Measurement:
    zeros = np.zeros(len(scores), dtype=np.int64)
    return Measurement(
        arm=arm,
        ids=tuple(f"row{place}" for place in range(len(scores))),
        answers=("",) * len(scores),
        scores={metric: scores.astype(np.float64)},
        prompt_tokens=zeros,
        completion_tokens=zeros,
        seconds=0.0,
    )


def compare(student: np.ndarray, teacher: np.ndarray, margin: float, metric: str = "exact_match") -> Equivalence:
    return equivalence(measurement("lora", student, metric), measurement("teacher", teacher, metric), metric, margin)


def over_base(low: float, high: float) -> Contrast:
    difference = Estimate(value=(low + high) / 2, low=low, high=high, n=N, level=0.95)
    return Contrast(a="lora", b="base", metric="exact_match", difference=difference, p_value=0.01)


def table(only_student: int, only_teacher: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores of both arms with so many rows that one alone gets right."""
    student, teacher = np.ones(n), np.ones(n)
    teacher[:only_student] = 0
    student[only_student : only_student + only_teacher] = 0
    return student, teacher


def score_z(only_student: int, only_teacher: int, n: int, d: float) -> float:
    """Tango's statistic of the difference d, with the nuisance share found by trying 20,000 values."""
    best, q = -math.inf, 0.0
    for share in np.linspace(max(0.0, -d), (1 - d) / 2, 20_001)[1:-1]:
        terms = ((only_student, share + d), (only_teacher, share), (n - only_student - only_teacher, 1 - 2 * share - d))
        if all(p > 0 for _, p in terms):
            likelihood = sum(count * math.log(p) for count, p in terms)
            if likelihood > best:
                best, q = likelihood, float(share)
    return (only_student - only_teacher - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))


@pytest.mark.parametrize(
    ("only_student", "only_teacher"), [(0, 0), (3, 6), (10, 12), (12, 21), (6, 24), (30, 30), (40, 20), (5, 40)]
)
def test_for_right_or_wrong_it_is_two_one_sided_score_tests(only_student: int, only_teacher: int) -> None:
    margin, z = 0.05, float(scipy_stats.norm.ppf(0.95))
    found = compare(*table(only_student, only_teacher), margin)
    not_worse = score_z(only_student, only_teacher, N, -margin) > z
    not_better = score_z(only_student, only_teacher, N, margin) < -z
    worse = score_z(only_student, only_teacher, N, -margin) < -z
    expected = ("equivalent" if not_better else "at least as good") if not_worse else "worse" if worse else "not shown"
    assert found.finding == expected
    assert found.difference.level == pytest.approx(0.9)


@pytest.mark.parametrize("seed", range(8))
def test_for_other_scores_it_agrees_with_two_t_tests(seed: int) -> None:
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0.6, 0.2, 80)
    student = teacher + rng.normal(0.01, 0.1, 80)
    difference = student - teacher
    bounds = scipy_stats.t.interval(0.9, 79, difference.mean(), scipy_stats.sem(difference))
    limit = float(np.abs(bounds).max())
    for margin in (0.9 * limit, 1.1 * limit):  # a bootstrap is not a t-test: not on the very edge
        low = scipy_stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        high = scipy_stats.ttest_1samp(difference, margin, alternative="less").pvalue
        found = compare(student, teacher, margin, "rouge_l")
        assert (found.finding == "equivalent") == bool(max(low, high) < 0.05)


@pytest.mark.parametrize("discordance", [0.06, 0.15, 0.3])
def test_at_the_margin_it_is_wrong_no_more_often_than_it_says(discordance: float) -> None:
    margin, draws = 0.05, 3000
    rng = np.random.default_rng(0)
    shares = [(discordance - margin) / 2, (discordance + margin) / 2, 1 - discordance]
    outcomes, counts = np.unique(rng.multinomial(N, shares, size=draws), axis=0, return_counts=True)
    fine = [
        compare(*table(int(a), int(b)), margin).finding in ("equivalent", "at least as good") for a, b, _ in outcomes
    ]
    rate = float(counts[np.array(fine)].sum() / draws)
    noise = 3 * math.sqrt(0.05 * 0.95 / draws)
    assert 0.02 < rate < 0.05 + noise


def test_equal_arms_are_equivalent_where_the_rows_suffice() -> None:
    assert compare(*table(0, 0), 0.05).finding == "equivalent"
    assert compare(*table(0, 0, 30), 0.05).finding == "not shown"
    assert compare(*table(0, 0, 9), 0.9).finding == "not shown"


def test_less_is_better_for_a_loss() -> None:
    teacher = np.linspace(1, 2, 40)
    assert compare(teacher - 0.5, teacher, 0.1, "completion_loss").finding == "at least as good"
    assert compare(teacher + 0.5, teacher, 0.1, "completion_loss").finding == "worse"


@pytest.mark.parametrize(
    ("pair", "risen", "decision", "told"),
    [
        ((4, 5), 0.0, "ship", "so lora is equivalent to teacher"),
        ((40, 5), 0.0, "ship", "so lora is at least as good as teacher"),
        ((5, 60), 0.0, "do not ship", "so lora is worse than teacher"),
        ((20, 32), 0.0, "not shown", "equality is not shown"),
        ((4, 5), 0.5, "do not ship", "more is forgotten"),
    ],
)
def test_the_verdict_follows_the_finding_and_says_why(
    pair: tuple[int, int], risen: float, decision: str, told: str
) -> None:
    forgetting = Estimate(value=risen, low=risen - 0.1, high=risen + 0.1, n=50, level=0.95)
    verdict = decide_equivalence(compare(*table(*pair), 0.05), over_base(0.1, 0.3), forgetting, 0.2)
    assert verdict.decision == decision
    assert told in " ".join(verdict.reasons)
    assert "90% interval" in verdict.reasons[0]
    assert "5.0 points" in verdict.reasons[0]


def test_a_handful_of_rows_is_said_to_be_one() -> None:
    verdict = decide_equivalence(compare(*table(0, 0, 9), 0.5), over_base(0.1, 0.3), None, 0.2)
    assert verdict.decision == "not shown"
    assert "9 held-out rows cannot carry a verdict" in verdict.reasons[0]


def test_a_student_that_is_no_better_than_the_base_is_not_shown_to_have_learned() -> None:
    verdict = decide_equivalence(compare(*table(0, 0), 0.05), over_base(-0.01, 0.01), None, 0.2)
    assert verdict.decision == "not shown"
    assert "not shown better than the base without a prompt" in verdict.reasons[1]
