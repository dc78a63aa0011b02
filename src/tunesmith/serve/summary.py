"""What the choices say of the raters and of the models: agreement, biases, attention, and who wins.

Biases, agreement and win rate use first showings of ordinary pairs; repeats and gold pairs only check attention.
docs/label.md says how to read each line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from ..evaluate.agreement import krippendorff
from ..evaluate.stats import estimate, win_rate
from ..types import Estimate
from .choices import Choice, Pair

EVERYBODY = "everybody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rater:
    """One rater's choices, or everybody's: counts of standing ones, and measures that need not exist."""

    name: str
    choices: int
    decided: int
    ties: int
    both_bad: int
    skipped: int
    undone: int
    median_seconds: float
    left: Estimate | None
    longer: Estimate | None
    repeats_alike: Estimate | None
    gold_right: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """How often the answers of model `a` were preferred to those of `b`; a tie, or both bad, is half a win.

    The estimate's items are pairs: several raters of one pair count as their mean.
    """

    a: str
    b: str
    win_rate: Estimate
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All of it. `agreement` is Krippendorff's alpha; None where nothing was judged twice, or all said the same.

    `equal` counts prompts whose two drawn answers were the same, which made no pair.
    """

    pairs: int
    judged: int
    equal: int
    raters: tuple[Rater, ...]
    everybody: Rater
    agreement: Estimate | None
    duels: tuple[Duel, ...]


def summarise(
    pairs: Mapping[str, Pair], choices: Collection[Choice], level: float = 0.95, seed: int = 0, equal: int = 0
) -> Summary:
    """Count and measure `choices`, those taken back included."""
    standing = [choice for choice in choices if not choice.undone]
    names = sorted({choice.rater for choice in choices})
    first = [choice for choice in standing if _counts(choice, pairs)]
    units: dict[str, list[str]] = defaultdict(list)
    for choice in first:
        units[choice.pair].append(choice.verdict)
    return Summary(
        pairs=sum(not pair.gold for pair in pairs.values()),
        judged=len(units),
        equal=equal,
        raters=tuple(_rater(name, pairs, [c for c in choices if c.rater == name], level, seed) for name in names),
        everybody=_rater(EVERYBODY, pairs, choices, level, seed),
        agreement=krippendorff(list(units.values()), level, seed),
        duels=tuple(_duels(pairs, first, level, seed)),
    )


def _counts(choice: Choice, pairs: Mapping[str, Pair]) -> bool:
    """Whether a choice is a judgement of an ordinary pair, seen for the first time."""
    return not choice.repeat and choice.pick != "skip" and not pairs[choice.pair].gold


def _rater(name: str, pairs: Mapping[str, Pair], choices: Collection[Choice], level: float, seed: int) -> Rater:
    standing = [choice for choice in choices if not choice.undone]
    picks = Counter(choice.pick for choice in standing)
    decided = [choice for choice in standing if choice.decided]
    first = [choice for choice in decided if _counts(choice, pairs)]
    gold = [choice for choice in standing if pairs[choice.pair].gold and choice.pick != "skip"]

    def share(scores: Iterable[float]) -> Estimate | None:
        found = list(scores)
        return estimate(found, level, seed) if found else None

    return Rater(
        name=name,
        choices=len(standing),
        decided=len(decided),
        ties=picks["tie"],
        both_bad=picks["both_bad"],
        skipped=picks["skip"],
        undone=len(choices) - len(standing),
        median_seconds=median(choice.seconds for choice in standing) if standing else 0.0,
        left=share(float(choice.pick == "left") for choice in first),
        longer=share(_by_pair(first, {name: _longer(pair) for name, pair in pairs.items()}).values()),
        repeats_alike=share(_alike(standing)),
        gold_right=share(float(choice.verdict == pairs[choice.pair].gold) for choice in gold),
    )


def _by_pair(choices: Iterable[Choice], wanted: Mapping[str, str]) -> dict[str, float]:
    """For each pair with a wanted side, the share of its choices that took it."""
    found: dict[str, list[float]] = defaultdict(list)
    for choice in choices:
        if wanted[choice.pair]:
            found[choice.pair].append(float(choice.verdict == wanted[choice.pair]))
    return {name: fmean(scores) for name, scores in found.items()}


def _longer(pair: Pair) -> str:
    """The side with more characters; nothing where both have as many."""
    a, b = len(pair.a.content), len(pair.b.content)
    return "" if a == b else "a" if a > b else "b"


def _alike(choices: Iterable[Choice]) -> list[float]:
    """For each repeat, 1 where the rater said the same of the answers as the first time."""
    first: dict[tuple[str, str], str] = {}
    second: dict[tuple[str, str], str] = {}
    for choice in choices:
        if choice.pick != "skip":
            (second if choice.repeat else first)[choice.rater, choice.pair] = choice.verdict
    return [float(first[key] == verdict) for key, verdict in second.items() if key in first]


def _duels(pairs: Mapping[str, Pair], choices: Sequence[Choice], level: float, seed: int) -> list[Duel]:
    """One Duel for each two models that were set against each other."""
    matches: dict[tuple[str, str], list[Choice]] = defaultdict(list)
    for choice in choices:
        pair = pairs[choice.pair]
        if pair.model_a and pair.model_b and pair.model_a != pair.model_b:
            turned = (pair.model_b, pair.model_a)
            matches[turned if turned in matches else (pair.model_a, pair.model_b)].append(choice)
    return [_duel(a, b, pairs, fought, level, seed) for (a, b), fought in matches.items()]


def _duel(a: str, b: str, pairs: Mapping[str, Pair], choices: Sequence[Choice], level: float, seed: int) -> Duel:
    wins: dict[str, list[float]] = defaultdict(list)
    for choice in choices:
        side_of_a = "a" if pairs[choice.pair].model_a == a else "b"
        wins[choice.pair].append(float(choice.verdict == side_of_a) if choice.decided else 0.5)
    results = Counter(score for scores in wins.values() for score in scores)
    return Duel(
        a=a,
        b=b,
        win_rate=win_rate(np.array([fmean(scores) for scores in wins.values()]), level, seed),
        wins=results[1.0],
        losses=results[0.0],
        ties=results[0.5],
    )
