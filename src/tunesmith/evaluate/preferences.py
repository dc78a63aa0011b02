"""How well scores agree with people's choices: accuracy, calibration, and whether length explains it.

Scores come as [pairs 2], the chosen answer's first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..types import FEWEST_ROWS, Contrast, Estimate, Verdict
from .stats import estimate, one_each, win_rate
from .verdict import MANY_CUT, judge_forgetting, too_few

Scores = Float[np.ndarray, "pairs 2"]
CALIBRATION = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LENGTHS_TOKENS = (-10, 0, 10)
MANY_TIES = 0.2  # of the prompts, from which on the reasons tell


def right(scores: Scores) -> Float[np.ndarray, "pairs"]:
    """1 where the chosen answer scores higher, 0 where the other does, a half for a tie."""
    return np.sign(scores[:, 0] - scores[:, 1]) / 2 + 0.5


def longer_wins(tokens: Int[np.ndarray, "pairs 2"]) -> Float[np.ndarray, "pairs"]:
    """The same for a judge who looks at length alone."""
    return right(tokens.astype(np.float64))


def agreement(first: Scores, second: Scores, groups: Sequence[str], level: float, seed: int) -> Estimate:
    """Share of pairs on which two models choose alike; `groups` says which pairs are one observation."""
    alike = (right(first) == right(second)).astype(np.float64)
    return estimate(one_each(alike, groups), level, seed)


def calibration(scores: Scores, groups: Sequence[str], level: float, seed: int) -> list[dict[str, Any]]:
    """How often the model is right where it says that it is right with probability p = sigmoid(difference)."""
    sure = 1 / (1 + np.exp(-np.abs(scores[:, 0] - scores[:, 1])))
    correct = right(scores)
    rows = []
    for low, high in pairwise(CALIBRATION):
        inside = (sure >= low) & ((sure < high) | (high == 1.0))
        if inside.any():
            found = asdict(_of_some(correct, groups, inside, level, seed))
            rows.append(
                {
                    "low": low,
                    "high": high,
                    "predicted": float(sure[inside].mean()),
                    "right": found,
                    "n": int(inside.sum()),
                }
            )
    return rows


def within_lengths(
    scores: Scores, tokens: Int[np.ndarray, "pairs 2"], groups: Sequence[str], level: float, seed: int
) -> list[dict[str, Any]]:
    """Accuracy by how much longer the chosen answer is: a judge of length is right on one side only."""
    longer = tokens[:, 0] - tokens[:, 1]
    shortest, equal, longest = LENGTHS_TOKENS
    parts = {
        f"chosen at least {-shortest} tokens shorter": longer <= shortest,
        "chosen somewhat shorter": (longer > shortest) & (longer < equal),
        "equally long": longer == equal,
        "chosen somewhat longer": (longer > equal) & (longer < longest),
        f"chosen at least {longest} tokens longer": longer >= longest,
    }
    correct = right(scores)
    return [
        {
            "label": label,
            "pair_accuracy": asdict(_of_some(correct, groups, inside, level, seed)),
            "n": int(inside.sum()),
        }
        for label, inside in parts.items()
        if inside.any()
    ]


def _of_some(
    correct: Float[np.ndarray, "pairs"],
    groups: Sequence[str],
    inside: Bool[np.ndarray, "pairs"],
    level: float,
    seed: int,
) -> Estimate:
    mine = [group for group, is_in in zip(groups, inside, strict=True) if is_in]
    return win_rate(one_each(correct[inside], mine), level, seed)


def scores_of(scores: Scores) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of the chosen and of the rejected answers' scores."""
    sides = {"chosen": scores[:, 0], "rejected": scores[:, 1]}
    return {name: {"mean": float(side.mean()), "sd": float(side.std())} for name, side in sides.items()}


def verdict_on_reward(accuracy: Estimate, over_length: Contrast, pairs: int) -> Verdict:
    """`ship` a reward model that is shown to beat both a coin and a judge of length; docs/rlhf.md has the rule."""
    counted = f"{pairs} held-out pairs" + (f" of {accuracy.n} prompts" if accuracy.n < pairs else "")
    seen = f"right on {accuracy.value:.1%} of {counted} ({accuracy.low:.1%} to {accuracy.high:.1%})"
    gain = over_length.difference
    beside = f"{gain.value:+.1%} against choosing the longer answer ({gain.low:+.1%} to {gain.high:+.1%})"
    if accuracy.n < FEWEST_ROWS:
        return Verdict(decision="not shown", reasons=(seen, beside, too_few(accuracy.n)))
    if accuracy.low > 0.5 and gain.low > 0:
        return Verdict(decision="ship", reasons=(seen, beside))
    if accuracy.high < 0.5 or gain.high < 0:
        return Verdict(decision="do not ship", reasons=(seen, beside))
    return Verdict(decision="not shown", reasons=(seen, beside))


def verdict_on_policy(
    win_rate: Estimate,
    by: str,
    asked: str,
    kl: Estimate,
    forgetting: Estimate | None,
    forgetting_limit: float,
    *,
    ties: float = 0.0,
    cut: Mapping[str, float] | None = None,
) -> Verdict:
    """`ship` a policy that is shown to win more often than not and not shown to forget; docs/rlhf.md has the rule.

    The share of `ties`, and `cut`, the share of each arm's answers that the limit of tokens ended, are only told.
    """
    seen = f"wins {win_rate.value:.1%} of {asked} against the model it began as, by {by} "
    seen += f"({win_rate.low:.1%} to {win_rate.high:.1%}), {kl.value:.1f} nats an answer away from it"
    harm, forgot = judge_forgetting(forgetting, forgetting_limit)
    reasons = (seen, *_told_of_wins(ties, cut or {}), forgot)
    if win_rate.n < FEWEST_ROWS:
        few = (seen, too_few(win_rate.n), *reasons[1:])
        return Verdict(decision="do not ship" if harm else "not shown", reasons=few)
    if harm or win_rate.high < 0.5:
        return Verdict(decision="do not ship", reasons=reasons)
    return Verdict(decision="ship" if win_rate.low > 0.5 else "not shown", reasons=reasons)


def _told_of_wins(ties: float, cut: Mapping[str, float]) -> list[str]:
    """What a reader of a win rate should know: how many prompts tell nothing, and whether an arm had room to answer."""
    told = []
    if ties > MANY_TIES:
        told.append(f"{ties:.0%} of the prompts are ties, which count as half a win and say nothing.")
    if any(share > MANY_CUT for share in cut.values()):
        shares = " and ".join(f"{share:.0%} of {arm}'s" for arm, share in cut.items())
        fix = "a win may be no more than coming to an end in time. Raise task.max_new_tokens if they were under way."
        told.append(f"The limit of answer tokens cut {shares} answers: {fix}")
    return told
