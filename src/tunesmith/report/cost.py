"""What tuning costs and what it gives back: prompt tokens saved, the break-even point, LoRA as a share of full.

Plain functions over the `arms` of `results.json` and per-item scores. Compute is counted as 2 N floating-point
operations per token and forward pass for a model of N parameters (Kaplan et al. 2020, arXiv 2001.08361), those of the
head for tokens of answers only; so attention is left out, and the saving of a long prompt is, if anything, understated.
A server that caches prompt prefixes saves part of it without tuning; the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..types import Estimate
from .record import is_number

FLOPS_PER_PARAMETER_AND_TOKEN = 2
_CHUNK_ROWS = 256  # resamples drawn at once: 256 x 100,000 items stay under 0.3 GB


def savings(
    arms: Mapping[str, Mapping[str, Any]], tuned: str, prompted: str, parameters: int | None, head: int = 0
) -> dict[str, Any]:
    """What one request to `tuned` saves against `prompted`, and when that repays the training.

    fraction = 1 - tuned prompt tokens / prompted ones; negative when the tuned arm reads more. Compute is saved by all
    tokens, those of the answers too. An unknown is None: the compute saved where `prompted` is another model, of which
    `parameters` would say nothing. `head` of them meet only tokens of answers.
    """
    before, after = (_number(arms.get(arm, {}).get("prompt_tokens_per_request")) for arm in (prompted, tuned))
    wrote, writes = (
        _number(arms.get(arm, {}).get("completion_tokens_per_request")) or 0.0 for arm in (prompted, tuned)
    )
    training_flops = _number((arms.get(tuned, {}).get("train") or {}).get("flops"))
    saved = before - after if before is not None and after is not None else None
    in_all = compute = None
    if saved is not None:
        in_all = saved + wrote - writes
        if parameters is not None:
            compute = FLOPS_PER_PARAMETER_AND_TOKEN * (parameters * in_all - head * saved)
    return {
        "tuned": tuned,
        "prompted": prompted,
        "prompt_tokens_saved_per_request": saved,
        "prompt_tokens_saved_fraction": saved / before if saved is not None and before else None,
        "tokens_saved_per_request": in_all,
        "flops_saved_per_request": compute,
        "training_flops": training_flops,
        "break_even_requests": break_even_requests(training_flops, compute),
    }


def break_even_requests(training_flops: float | None, saved: float | None) -> int | None:
    """Requests after which the FLOPs `saved` by each have repaid training.

    None when nothing is saved or the cost of training is unknown.
    """
    if training_flops is None or saved is None or saved <= 0:
        return None
    return math.ceil(training_flops / saved)


def lora_versus_full(
    arms: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Sequence[float] | np.ndarray],
    prompted: str,
    *,
    lower_is_better: bool = False,
    tuned: str = "lora",
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> dict[str, Any]:
    """An adapter as a share of full fine-tuning: of its gain over the best prompt, and of what it costs to get there.

    `scores` holds one number per item for `tuned`, `full` and `prompted`, in the same order of items.
    `quality_fraction` is None, and `quality_note` says why, where full fine-tuning itself shows no gain.
    """
    sign = -1.0 if lower_is_better else 1.0
    base = np.asarray(scores[prompted], dtype=np.float64)
    own_gain = sign * (np.asarray(scores[tuned], dtype=np.float64) - base)
    full_gain = sign * (np.asarray(scores["full"], dtype=np.float64) - base)
    quality = gain_ratio(own_gain, full_gain, level=level, resamples=resamples, seed=seed)
    note = "" if quality else "full fine-tuning shows no gain over the best prompt, so a share of it means nothing"
    own, full = arms[tuned].get("train") or {}, arms["full"].get("train") or {}
    return {
        "quality_fraction": asdict(quality) if quality else None,
        "quality_note": note,
        "flops_fraction": _fraction(own.get("flops"), full.get("flops")),
        "seconds_fraction": _fraction(own.get("seconds"), full.get("seconds")),
        "memory_fraction": _fraction(own.get("peak_memory_bytes"), full.get("peak_memory_bytes")),
        "checkpoint_fraction": _fraction(own.get("checkpoint_bytes"), full.get("checkpoint_bytes")),
    }


def gain_ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Estimate | None:
    """mean(numerator) / mean(denominator) with a percentile interval from a bootstrap that keeps items paired.

    Both arrays hold one gain per item, shape (N,). None when the denominator's interval does not lie above zero:
    a ratio to nothing has no interval (Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 10 and 13).
    """
    if numerator.shape != denominator.shape or numerator.ndim != 1:
        raise ValueError(f"gains must be two arrays of one shape (N,), got {numerator.shape} and {denominator.shape}")
    n = numerator.size
    if n == 0:
        return None
    tails = [(1 - level) / 2, (1 + level) / 2]
    above, below = _resampled_means(np.stack([numerator, denominator], axis=1), resamples, seed).T
    if denominator.mean() <= 0 or np.quantile(below, tails[0]) <= 0:
        return None
    usable = below > 0  # the guard leaves at most (1 - level) / 2 of the resamples out
    low, high = np.quantile(above[usable] / below[usable], tails)
    ratio = float(numerator.mean() / denominator.mean())
    return Estimate(value=ratio, low=float(low), high=float(high), n=n, level=level)


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `values` (N, K) over `resamples` draws of N items with replacement, shape (resamples, K)."""
    generator = np.random.default_rng(seed)
    n = len(values)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, _CHUNK_ROWS):
        rows = min(_CHUNK_ROWS, resamples - start)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=rows)
        means[start : start + rows] = counts @ values / n
    return means


def _fraction(part: Any, whole: Any) -> float | None:
    part, whole = _number(part), _number(whole)
    return part / whole if part is not None and whole else None


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if is_number(value) else None
