"""Held-out rows shown in the report: a fixed mix of what tuning mended, broke and left wrong, picked by hash.

Nobody chooses the rows by hand, and the counts beside them say how common each kind is among all test rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluate.metrics import higher_is_better
from . import words
from .record import Json, RunRecord, is_number, part

PROMPT_CHARACTERS, ANSWER_CHARACTERS = 700, 400
OUTCOMES = {
    "mended": "mended by tuning",
    "broken": "broken by tuning",
    "wrong": "wrong before and after",
    "right": "right before and after",
    "unchanged": "same score before and after",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """One arm's answer: `mark` is `right`, `wrong` or empty where the metric grades in between."""

    label: str
    kind: str
    text: str
    score: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """One held-out row with every arm's answer to it."""

    id: str
    outcome: str
    label: str
    prompt: str
    reference: str
    answers: tuple[ShownAnswer, ...]


def outcomes(run: RunRecord) -> Mapping[str, list[str]]:
    """Ids of test rows by outcome of the first tuned arm against the best prompt; empty where answers are absent."""
    tuned, prompted = _scores(run, run.subject), _scores(run, run.prompted)
    shared = [row for row in tuned if row in prompted]
    binary = all(score in (0, 1) for row in shared for score in (tuned[row], prompted[row]))
    sign = 1 if higher_is_better(run.metric) else -1
    found: dict[str, list[str]] = {name: [] for name in OUTCOMES}
    for row in shuffled(shared):
        change = sign * (tuned[row] - prompted[row])
        same = ("right" if tuned[row] == 1 else "wrong") if binary else "unchanged"
        found["mended" if change > 0 else "broken" if change < 0 else same].append(row)
    return {name: rows for name, rows in found.items() if rows}


def shuffled(ids: Iterable[str], seed: object = "") -> list[str]:
    """Ids in an order that depends on each id and the seed alone, so that nobody chose it."""
    return sorted(ids, key=lambda row: hashlib.sha256(f"{row}{seed}".encode()).digest())


def choose(groups: Mapping[str, Sequence[str]], rows: int = 12) -> list[tuple[str, str]]:
    """(outcome, id) of the rows to show: a third each mended, broken and wrong, the rest filled up in that order."""
    quota: dict[str, int] = dict.fromkeys(("mended", "broken", "wrong", "unchanged"), rows // 3)
    taken = {name: list(groups.get(name, ()))[: quota.get(name, 0)] for name in OUTCOMES}
    for name in OUTCOMES:
        free = rows - sum(map(len, taken.values()))
        have = len(taken[name])
        taken[name] += list(groups.get(name, ()))[have : have + max(free, 0)]
    return [(name, row) for name in OUTCOMES for row in taken[name]][:rows]


def shown_rows(run: RunRecord, rows: int = 12) -> list[ShownRow]:
    """The chosen rows with the answers of every arm that answered them."""
    by_arm = {arm: {str(line.get("id")): line for line in run.answers[arm]} for arm in run.arms if arm in run.answers}
    shown = []
    for outcome, row in choose(outcomes(run), rows):
        line = by_arm[str(run.subject)][row]
        answers = [_answer(run, arm, lines[row]) for arm, lines in by_arm.items() if row in lines]
        shown.append(
            ShownRow(
                id=row,
                outcome=outcome,
                label=OUTCOMES[outcome],
                prompt=clip(prompt_text(line.get("prompt")), PROMPT_CHARACTERS),
                reference=clip(str(line.get("reference", "")), ANSWER_CHARACTERS),
                answers=tuple(answers),
            )
        )
    return shown


def tally(counts: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """(label, rows, share of all rows), as the page lists them."""
    total = sum(counts.values())
    return [(label, rows, words.percent(rows / total)) for label, rows in counts.items() if rows]


def prompt_text(prompt: Any) -> str:
    """A prompt as text: a list of messages becomes `role: content` lines, or the content where there is but one."""
    if not isinstance(prompt, list):
        return "" if prompt is None else str(prompt)
    if len(prompt) == 1:
        return str(part(prompt[0], "content"))
    return "\n".join(f"{part(message, 'role')}: {part(message, 'content')}" for message in prompt)


def clip(text: str, characters: int) -> str:
    """The first `characters` of a text, and how many more there are."""
    rest = len(text) - characters
    return text if rest <= 0 else f"{text[:characters].rstrip()} … ({rest:,} more characters)"


def _scores(run: RunRecord, arm: str | None) -> dict[str, float]:
    """Id to score on the deciding metric."""
    lines = run.answers.get(arm or "", ())
    return {str(line.get("id")): score for line in lines if is_number(score := part(line, "scores", run.metric))}


def _answer(run: RunRecord, arm: str, line: Json) -> ShownAnswer:
    score = part(line, "scores", run.metric)
    return ShownAnswer(
        label=words.arm_label(run, arm),
        kind=run.kind(arm),
        text=clip(str(line.get("answer", "")), ANSWER_CHARACTERS),
        score=words.metric_text(run.metric, score),
        mark={1: "right", 0: "wrong"}.get(score, "") if higher_is_better(run.metric) and is_number(score) else "",
    )
