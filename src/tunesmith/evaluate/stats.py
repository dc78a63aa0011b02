"""Intervals and paired comparisons: how sure a run may be of what it measured. verdict.py draws the conclusion.

Scores that are all 0 or 1 get score intervals (Wilson, Tango), which stay honest when no item fails or none differs;
other scores get the bootstrap. Everything random is a function of `seed`. docs/statistics.md says why, for users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize, special

from ..errors import DataError
from ..types import FEWEST_ROWS, Contrast, Equivalence, Estimate, Measurement, Sameness
from .metrics import higher_is_better

RESAMPLES = 10_000
CHUNK_NUMBERS = 2_000_000  # 16 MB of float64: the most that one chunk of resamples holds
RATE_OF_DISAGREEMENT = 0.3  # two arms that are right on 80 % of items and err independently disagree on 32 %


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): low and high, within 0..1. Never of width 0, not even at 0 of n."""
    z = z_of(level)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def tango(only_a: int, only_b: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of the difference of two paired shares (Tango 1998, Statistics in Medicine 17:891-908).

    `only_a` counts items that only a gets right, `only_b` those that only b does, `n` all of them. The interval holds
    the differences that the score test does not reject; at difference 0 that is McNemar's test without correction.
    """
    return -_tango_high(only_b, only_a, n, level), _tango_high(only_a, only_b, n, level)


def bootstrap(values: Float[np.ndarray, "N"], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Expanded percentile bootstrap interval of the mean (Hesterberg 2015, arXiv 1411.5279).

    The plain percentile interval is too narrow for few items. Here its tail is Phi(-sqrt(n/(n-1)) t), with t the
    quantile of Student's t with n-1 degrees of freedom, so that its width is that of the t interval.
    One value has no spread to resample: its interval is the value.
    """
    n, mean = len(values), float(values.mean())
    if n == 1:
        return mean, mean
    tail = float(special.ndtr(-math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 + level) / 2)))
    rng = np.random.default_rng(seed)
    means = np.concatenate([values[rng.integers(n, size=(rows, n))].mean(axis=1) for rows in _chunks(n)])
    # Both ends from the same quantile, so that negated values give exactly the negated interval.
    low, high = float(np.quantile(means, tail)), -float(np.quantile(-means, tail))
    return min(mean, low), max(mean, high)


def estimate(scores: Sequence[float] | Float[np.ndarray, "N"], level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean with its interval: Wilson's where all scores are 0 or 1, else the bootstrap's.

    Raises DataError where there is no score or one is not finite.
    """
    values = _checked(scores, "scores")
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    low, high = wilson(int(values.sum()), len(values), level) if binary else bootstrap(values, level, seed)
    return Estimate(value=float(values.mean()), low=low, high=high, n=len(values), level=level)


def contrast(a: Measurement, b: Measurement, metric: str, level: float = 0.95, seed: int = 0) -> Contrast:
    """The mean difference a - b over the same items, its interval, and the two-sided p-value of no difference.

    Where scores lie in 0..1 and differ by 0 or 1 only: Tango's interval and the exact McNemar test. Otherwise the
    paired bootstrap and a paired permutation test. Raises DataError where the two did not answer the same items.
    """
    _check_pairing(a, b, metric)
    left, right = (_checked(arm.scores[metric], f"{metric} of {arm.arm}") for arm in (a, b))
    if _is_binary_pair(left, right):
        p_value = mcnemar(int((left > right).sum()), int((left < right).sum()))
    else:
        p_value = permutation(left - right, seed)
    return Contrast(a=a.arm, b=b.arm, metric=metric, difference=paired(left, right, level, seed), p_value=p_value)


def paired(left: Float[np.ndarray, "N"], right: Float[np.ndarray, "N"], level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of left - right over the same items: Tango's interval where they differ by 0 or 1, else bootstrap's."""
    difference = left - right
    if _is_binary_pair(left, right):
        low, high = tango(int((difference > 0).sum()), int((difference < 0).sum()), len(difference), level)
    else:
        low, high = bootstrap(difference, level, seed)
    value = float(difference.mean())
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=len(difference), level=level)


def win_rate(wins: Float[np.ndarray, "N"], level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of wins (1), losses (0) and ties (1/2), with Tango's interval of wins minus losses, halved.

    Without ties that is Wilson's; with nothing but ties it keeps a width. Other shares, as of several raters of a pair,
    get the bootstrap's. Raises DataError as `estimate` does.
    """
    if np.isin(_checked(wins, "wins"), (0.0, 1.0)).all():
        return estimate(wins, level, seed)
    lead = paired(wins, 1 - wins, level, seed)
    value, low, high = ((1 + number) / 2 for number in (lead.value, lead.low, lead.high))
    return Estimate(value=value, low=low, high=high, n=lead.n, level=level)


def one_each(values: Float[np.ndarray, "N"], groups: Sequence[str]) -> Float[np.ndarray, "groups"]:
    """The mean of each group's values, groups by first appearance: what depends on one thing is one observation."""
    _, first, group = np.unique(np.asarray(groups, dtype=object).astype(str), return_index=True, return_inverse=True)
    means = np.bincount(group, weights=values) / np.bincount(group)
    return means[np.argsort(first)]


def equivalence(
    a: Measurement, b: Measurement, metric: str, margin: float, level: float = 0.95, seed: int = 0
) -> Equivalence:
    """Whether a is as good as b, by two one-sided tests of size alpha = 1 - level each.

    Both reject where the interval of level 1 - 2 alpha lies within the margin (Schuirmann 1987, Journal of
    Pharmacokinetics and Biopharmaceutics 15:657-680), and then the chance of a false `equivalent` is at most alpha.
    The interval is `contrast`'s; Tango 1998 made his for this test. Only the lower test rejects: a is at least as good
    (within the margin). The whole interval beyond the margin: worse. Raises DataError as `contrast` does.
    """
    difference = contrast(a, b, metric, 2 * level - 1, seed).difference
    low, high = improvement(difference, metric)
    finding: Sameness = "not shown"
    if difference.n >= FEWEST_ROWS:
        if low > -margin:
            finding = "equivalent" if high < margin else "at least as good"
        elif high < -margin:
            finding = "worse"
    return Equivalence(a=a.arm, b=b.arm, metric=metric, margin=margin, difference=difference, finding=finding)


def improvement(difference: Estimate, metric: str) -> tuple[float, float]:
    """The interval of a difference, turned so that above 0 is better."""
    sign = 1 if higher_is_better(metric) else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: of the items on which the arms differ, each side wins with chance 1/2 (McNemar 1947)."""
    from scipy import stats  # here, as it takes half a second, and the first optimizer step waits

    differing = only_a + only_b
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), differing, 0.5))) if differing else 1.0


def permutation(differences: Float[np.ndarray, "N"], seed: int = 0) -> float:
    """Two-sided p-value of the mean difference under random signs (Fisher 1935), from RESAMPLES draws.

    Counts the observed signs as one draw, so it is never 0 (Phipson and Smyth 2010). Equal items change nothing.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(float(moved.sum())) * (1 - 1e-12)  # a sum in another order may round down
    sums = (np.abs(_signs(rng, rows, len(moved)) @ moved) for rows in _chunks(len(moved)))
    return (1 + sum(int((chunk >= observed).sum()) for chunk in sums)) / (1 + RESAMPLES)


def smallest_difference(
    n: int,
    level: float = 0.95,
    power: float = 0.8,
    discordance: float = RATE_OF_DISAGREEMENT,
    sd: float | None = None,
) -> float:
    """The smallest true paired difference that n items show at this level with this power.

    For 0/1 scores (`sd` not given), `discordance` is the share of items on which the arms disagree. With z = z_level
    and y = z_power, McNemar's test needs n d^2 = (z sqrt(q) + y sqrt(q - d^2))^2 (Connor 1987, Biometrics 43:207-211),
    solved for d. As d cannot exceed q, q is raised to d where n is too small for the q given. 1.0 where nothing shows.
    For other scores, d = (t_level + t_power) sd / sqrt(n), `sd` being that of the paired differences.
    """
    if sd is not None:
        return float(sum(special.stdtrit(n - 1, [(1 + level) / 2, power])) * sd / math.sqrt(n)) if n > 1 else math.inf
    z, y = z_of(level), float(special.ndtri(power))
    root = n + y**2 - z**2
    difference = math.sqrt(discordance) * (z * math.sqrt(n) + y * math.sqrt(root)) / (n + y**2) if root > 0 else 1.0
    if difference <= discordance:
        return difference

    def surplus(d: float) -> float:
        return math.sqrt(n * d) - z - y * math.sqrt(1 - d)

    return float(_root(surplus, 0.0, 1.0)) if surplus(1.0) > 0 else 1.0


def z_of(level: float) -> float:
    return float(special.ndtri((1 + level) / 2))


def _tango_high(only_a: int, only_b: int, n: int, level: float) -> float:
    """Where the score statistic of the difference d falls to -z; see `tango`."""
    observed, z = (only_a - only_b) / n, z_of(level)
    if only_a == n:
        return 1.0

    def surplus(d: float) -> float:
        # The share that only b gets right, most likely given d, is the larger root of 2n p^2 + linear p + constant.
        linear, constant = (2 * n - only_a + only_b) * d - only_a - only_b, -only_b * d * (1 - d)
        share_b = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        return n * (observed - d) + z * math.sqrt(max(0.0, n * (2 * share_b + d * (1 - d))))

    # Without spread at the observed value (no item differs) the surplus starts at 0; its other root is the limit.
    return max(observed, float(_root(surplus, observed + 1e-9, 1.0)))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return optimize.brentq(function, low, high, xtol=1e-13)  # pyright: ignore[reportReturnType]


def _signs(rng: np.random.Generator, rows: int, n: int) -> Float[np.ndarray, "draws N"]:
    return 2.0 * rng.integers(2, size=(rows, n), dtype=np.int8) - 1.0


def _chunks(n: int) -> Iterator[int]:
    """How many of the RESAMPLES to draw at a time, so that memory stays bounded."""
    rows = max(1, min(RESAMPLES, CHUNK_NUMBERS // n))
    for start in range(0, RESAMPLES, rows):
        yield min(rows, RESAMPLES - start)


def _is_binary_pair(left: Float[np.ndarray, "N"], right: Float[np.ndarray, "N"]) -> bool:
    """Scores in 0..1 that differ by 0 or 1 only: all are 0 or 1, or equal, which is as good as both right."""
    inside: Bool[np.ndarray, "N"] = (np.minimum(left, right) >= 0) & (np.maximum(left, right) <= 1)
    return bool((inside & np.isin(left - right, (-1.0, 0.0, 1.0))).all())


def _checked(scores: Sequence[float] | Float[np.ndarray, "N"], what: str) -> Float[np.ndarray, "N"]:
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise DataError(f"no {what} to average", fix="Give the test split at least one row.")
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"number {place + 1} of the {what} is {values[place]}", fix="Check this answer's metric.")
    return values


def _check_pairing(a: Measurement, b: Measurement, metric: str) -> None:
    where = f"{a.arm} and {b.arm}"
    for arm in (a, b):
        if metric not in arm.scores:
            known = ", ".join(arm.scores) or "none"
            raise DataError(f"{arm.arm} has no {metric}", where=where, fix=f"Its metrics: {known}. Measure it again.")
    if len(a.ids) != len(b.ids):
        what = f"{a.arm} answered {len(a.ids)} items, {b.arm} {len(b.ids)}"
        raise DataError(what, where=where, fix="Measure both on the same held-out rows.")
    for place, pair in enumerate(zip(a.ids, b.ids, strict=True)):
        if pair[0] != pair[1]:
            what = f"item {place + 1} is {pair[0]} for {a.arm} and {pair[1]} for {b.arm}"
            raise DataError(what, where=where, fix="Measure both on the same held-out rows, in the same order.")
