"""How far raters agree beyond chance: Krippendorff's alpha for nominal data, with a bootstrap interval over units."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from ..types import Estimate
from .stats import CHUNK_NUMBERS, RESAMPLES


def krippendorff(units: Sequence[Sequence[Hashable]], level: float = 0.95, seed: int = 0) -> Estimate | None:
    """alpha = 1 - observed / expected disagreement (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).

    `units` holds, for each thing that was judged, the judgements it got, in any order; a unit with fewer than two
    compares nothing and is left out. 1 is full agreement, 0 what chance gives, below 0 is worse than chance. The
    interval resamples units, widened for few of them as in `stats.bootstrap`. `n` counts the units compared.
    None where nothing can be compared, or everybody always said the same: then there is no chance to agree beyond.
    """
    compared = [unit for unit in units if len(unit) > 1]
    if len({value for unit in compared for value in unit}) < 2:
        return None
    counts = _counts(compared)
    n = len(counts)
    once = np.ones((1, n))
    value = float(_alpha(counts, once)[0])
    if n == 1:
        return Estimate(value=value, low=value, high=value, n=1, level=level)
    rng = np.random.default_rng(seed)
    rows = max(1, min(RESAMPLES, CHUNK_NUMBERS // n))
    drawn = [
        _alpha(counts, rng.multinomial(n, np.full(n, 1 / n), size=min(rows, RESAMPLES - start)).astype(np.float64))
        for start in range(0, RESAMPLES, rows)
    ]
    alphas = np.concatenate(drawn)
    alphas = alphas[np.isfinite(alphas)]  # a resample of equal judgements only has no alpha
    tail = float(special.ndtr(-math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, (1 + level) / 2)))
    low, high = (float(np.quantile(alphas, q)) for q in (tail, 1 - tail))
    return Estimate(value=value, low=min(value, low), high=max(value, high), n=n, level=level)


def _counts(units: Sequence[Sequence[Hashable]]) -> Int[np.ndarray, "N K"]:
    """How often each unit got each value."""
    values = list(dict.fromkeys(value for unit in units for value in unit))
    return np.array([[unit.count(value) for value in values] for unit in map(list, units)])


def _alpha(counts: Int[np.ndarray, "N K"], weights: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R"]:
    """Alpha of each of R weightings of the units; NaN where only one value occurs."""
    judgements = counts.sum(1)
    within = (judgements**2 - (counts**2).sum(1)) / (judgements - 1)  # pairs that disagree, per judgement
    n, by_value = weights @ judgements, weights @ counts
    observed = (weights @ within) / n
    expected = 1 - (by_value * (by_value - 1)).sum(1) / (n * (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)
