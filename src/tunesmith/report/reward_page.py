"""The page of a reward model: does it choose as people did, beyond what length tells, and as surely as it says?"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..types import Estimate
from . import examples, findings, tables, words
from .content import Page
from .drawing import INK, TUNED, Chart, draw_interval, draw_note, drawing, finish, label_rows, rule
from .examples import ShownAnswer, ShownRow
from .findings import Tile
from .record import Json, RunRecord, as_estimate, is_number, part
from .tables import Cell, Table

_SECTIONS = {
    "result": "Result",
    "calibration": "Calibration",
    "length": "Length",
    "cost": "Cost",
    "training": "Training",
    "plan": "Plan",
    "data": "Data",
    "examples": "Test pairs",
    "reproduce": "Reproduce",
}
_METRIC = "pair_accuracy"
_LABEL_CHARACTERS = 26


def reward_page(run: RunRecord) -> Page:
    """What training a reward model found."""
    pairs = _shown_pairs(run)
    return Page(
        template="reward_page.html.j2",
        finding=_finding(run),
        reasons=findings.reasons(run),
        tiles=_tiles(run),
        brief=tables.brief_table(run, {"trained on pairs": lambda arm: words.count(part(run.arms, arm, "pairs"))}),
        sections={name: label for name, label in _SECTIONS.items() if pairs or name != "examples"},
        charts={"calibration": calibration_chart(run), "by_length": by_length_chart(run)},
        tables={"calibration": _calibration_table(run), "answers": _answers_table(run)},
        more={
            "agreement": _agreement(run),
            "pairs": pairs,
            "outcomes": examples.tally(_counts(run)),
        },
    )


def calibration_chart(run: RunRecord) -> Chart | None:
    """Share right by how sure the model said it was, with the line on which both are the same."""
    bins = _bins(run)
    if not bins:
        return None
    with drawing(rows=7) as figure:
        axes = figure.subplots()
        axes.plot([50, 100], [50, 100], color=INK, linewidth=1, linestyle="--", label="as right as it says")
        for predicted, right in bins:
            x = 100 * predicted
            axes.plot([x, x], [100 * right.low, 100 * right.high], color=TUNED, linewidth=2.2, solid_capstyle="round")
        xs, ys = [100 * p for p, _ in bins], [100 * right.value for _, right in bins]
        axes.plot(xs, ys, color=TUNED, marker="D", markersize=6, linewidth=1.2, label="measured, with interval")
        figure.legend(loc="outside lower center", ncols=2)
        axes.set_xlim(49, 101)
        axes.set_ylim(min(49, *(100 * right.low - 2 for _, right in bins)), 101)
        axes.set_xlabel("confidence in its choice (%)")
        axes.set_ylabel("choices that are right (%)")
        rule(axes)
        told = "; ".join(f"{words.percent(p)} said, {words.percent(right.value)} right" for p, right in bins)
        return finish(figure, "calibration", _confidence(bins), f"Confidence against share right: {told}.")


def by_length_chart(run: RunRecord) -> Chart | None:
    """Accuracy by how much longer the chosen answer is: a model that learned length fails where it is shorter."""
    rows = _by_length(run)
    if not rows:
        return None
    with drawing(rows=1.35 * len(rows)) as figure:
        axes = figure.subplots()
        axes.axvline(50, color=INK, linewidth=1)
        for y, (_, score) in enumerate(reversed(rows)):
            draw_interval(axes, y, score, 100, color=TUNED, marker="D")
            draw_note(axes, 100 * score.high, y, words.metric_text(_METRIC, score.value))
        labels = [
            f"{label} {words.NO_BREAK.join(['(n', '=', words.count(score.n)])})" for label, score in reversed(rows)
        ]
        label_rows(axes, [textwrap.fill(label, _LABEL_CHARACTERS) for label in labels])
        low, high = min(50.0, *(100 * score.low for _, score in rows)), max(100 * score.high for _, score in rows)
        axes.set_xlim(low - 0.04 * (high - low), high + 0.2 * (high - low or 1.0))
        axes.set_xlabel(f"pair accuracy (%), {words.level_text(rows[0][1].level)} interval")
        worst, best = (f(rows, key=lambda row: row[1].value) for f in (min, max))
        title = f"Least often right where {worst[0]}: {words.metric_text(_METRIC, worst[1].value)}"
        if worst[1].low <= best[1].high and best[1].low <= worst[1].high:
            title = "No length difference at which it is clearly worse"
        told = "; ".join(f"{label} {words.metric_text(_METRIC, score.value)}" for label, score in rows)
        return finish(figure, "by-length", title, f"Pair accuracy by difference in length: {told}.")


def _finding(run: RunRecord) -> str:
    subject = run.subject
    score = run.estimate(subject) if subject else None
    if subject is None or score is None:
        return "No pair accuracy was measured on held-out pairs."
    told = (
        f"The {words.arm_label(run, subject)} chooses as people did on {words.metric_text(_METRIC, score.value)} of "
        f"{_pairs(run, score.n)} ({findings.interval(_METRIC, score)})"
    )
    length = run.estimate("length")
    if length is None:
        return f"{told}. Taking the longer answer was not measured beside it."
    return f"{told}; taking the longer answer each time does so on {words.metric_text(_METRIC, length.value)}."


def _pairs(run: RunRecord, observations: int) -> str:
    """How many pairs were judged, and of how many prompts where several pairs of one count together."""
    pairs = part(run.results, "data", "test")
    if not is_number(pairs) or pairs <= observations:
        return f"{words.count(observations)} held-out pairs"
    return f"{words.count(pairs)} held-out pairs of {words.count(observations)} prompts"


def _tiles(run: RunRecord) -> list[Tile]:
    if run.subject is None:
        return []
    agreement = as_estimate(part(run.results, "agreement"))
    return [
        findings.score_tile(run, run.subject),
        findings.gain_tile(run, run.subject, "length"),
        findings.estimate_tile("agreement with the judge", _METRIC, agreement),
        _calibration_tile(run),
        findings.cost_tile(run),
    ]


def _calibration_tile(run: RunRecord) -> Tile:
    bins = _bins(run)
    label = "expected calibration error"
    if not bins:
        return Tile(label=label, value=words.ABSENT, note="not measured")
    total = sum(right.n for _, right in bins) or 1
    error = sum(right.n * abs(predicted - right.value) for predicted, right in bins) / total
    return Tile(label=label, value=words.percent(error, 1), note="mean gap of confidence and share right")


def _agreement(run: RunRecord) -> str:
    """Two models of different pairs, on the same test pairs."""
    found = as_estimate(part(run.results, "agreement"))
    if found is None:
        return (
            "No second model was trained to judge: a policy tuned on this reward would be scored by its own teacher. "
            "preference.halves: true trains one."
        )
    return (
        f"Reward model and judge learned from different halves of the pairs. They choose alike on "
        f"{words.metric_text(_METRIC, found.value)} of {_pairs(run, found.n)} "
        f"({findings.interval(_METRIC, found)}); on the others one of the two is wrong."
    )


def _confidence(bins: Sequence[tuple[float, Estimate]]) -> str:
    total = sum(right.n for _, right in bins) or 1
    said = sum(right.n * predicted for predicted, right in bins) / total
    was = sum(right.n * right.value for _, right in bins) / total
    verdict = (
        "Too sure of itself"
        if said - was > 0.02
        else "Right more often than it says"
        if was - said > 0.02
        else "Well calibrated"
    )
    return f"{verdict}: {words.percent(said, 1)} confidence, {words.percent(was, 1)} right"


def _bins(run: RunRecord) -> list[tuple[float, Estimate]]:
    """(mean confidence, share right) of each bin that holds pairs, from unsure to sure."""
    found = [
        (float(row["predicted"]), right)
        for row in run.lines("calibration")
        if is_number(row.get("predicted")) and (right := as_estimate(row.get("right"))) and right.n
    ]
    return sorted(found, key=lambda one: one[0])


def _by_length(run: RunRecord) -> list[tuple[str, Estimate]]:
    rows = [(str(row.get("label", "")), as_estimate(row.get(_METRIC))) for row in run.lines("by_length")]
    return [(label, found) for label, found in rows if found and found.n]


def _calibration_table(run: RunRecord) -> Table:
    rows = [
        [
            Cell(text=words.metric_text(_METRIC, predicted)),
            Cell(text=words.metric_text(_METRIC, right.value), note=words.interval_text(_METRIC, right)),
            Cell(text=words.count(right.n)),
        ]
        for predicted, right in _bins(run)
    ]
    return Table(columns=["mean confidence", "right", "pairs"], rows=rows, words=0)


def _answers_table(run: RunRecord) -> Table:
    """Mean and spread of the reward model's scores of chosen and of rejected answers."""
    scores = part(run.results, "scores")
    rows = [
        [
            Cell(text=f"{side} answers"),
            *(Cell(text=words.metric_text("", part(scores, side, key))) for key in ("mean", "sd")),
        ]
        for side in ("chosen", "rejected")
        if is_number(part(scores, side, "mean"))
    ]
    return Table(columns=["score of", "mean", "standard deviation"], rows=rows)


def _gaps(run: RunRecord) -> dict[str, float]:
    """Id of a test pair to score of the chosen minus score of the rejected answer."""
    scores = {str(line.get("id")): part(line, "scores") for line in run.answers.get(run.subject or "", ())}
    sides = {row: (part(pair, "chosen"), part(pair, "rejected")) for row, pair in scores.items()}
    return {
        row: chosen - rejected for row, (chosen, rejected) in sides.items() if is_number(chosen) and is_number(rejected)
    }


def _counts(run: RunRecord) -> dict[str, int]:
    gaps = _gaps(run).values()
    right = sum(gap > 0 for gap in gaps)
    return {"chosen as people did": right, "chosen otherwise": len(gaps) - right}


def _shown_pairs(run: RunRecord, each: int = 3) -> list[ShownRow]:
    """The surest mistakes, then pairs drawn by hash."""
    gaps = _gaps(run)
    lines = {str(line.get("id")): line for line in run.answers.get(run.subject or "", ())}
    wrong = [row for row in sorted(gaps, key=lambda row: (gaps[row], row)) if gaps[row] <= 0][:each]
    others = [row for row in examples.shuffled(gaps, part(run.recipe, "evaluate", "seed")) if row not in wrong][:each]
    shown = [("broken", "surest mistake", row) for row in wrong]
    shown += [("", "drawn at random" + ("" if gaps[row] > 0 else ", wrong"), row) for row in others]
    return [_shown_pair(row, outcome, label, lines[row]) for outcome, label, row in shown]


def _shown_pair(row: str, outcome: str, label: str, line: Json) -> ShownRow:
    answers = [
        ShownAnswer(
            label=f"{side} by people",
            kind="tuned" if side == "chosen" else "lookup",
            text=examples.clip(str(line.get(side, "")), examples.ANSWER_CHARACTERS),
            score=f"score {words.metric_text('', part(line, 'scores', side))}",
            mark="",
        )
        for side in ("chosen", "rejected")
    ]
    prompt = examples.clip(examples.prompt_text(line.get("prompt")), examples.PROMPT_CHARACTERS)
    return ShownRow(id=row, outcome=outcome, label=label, prompt=prompt, reference="", answers=tuple(answers))
