"""The report's charts, one function each: what the run folder says, drawn, with the finding as the title.

A chart with nothing to show is None. Every kind of arm has a colour and a marker of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..evaluate.metrics import higher_is_better
from ..types import Estimate
from . import words
from .drawing import (
    INK,
    LOOKUP,
    MUTED,
    PROMPTED,
    TUNED,
    TUNED_TOO,
    Chart,
    draw_interval,
    draw_note,
    drawing,
    finish,
    label_rows,
    legend_handle,
    rule,
)  # fmt: skip
from .record import RunRecord, as_estimate, is_number, part

_MARKERS = {"prompted": "o", "lookup": "s", "tuned": "D"}
_LOOK: dict[str, Any] = {"marker": "D", "markersize": 4.5, "linewidth": 2}  # of a validation curve
_CHANCE = {"pair_accuracy": 0.5}
_LOSS_UNITS = {"sft": "loss (nats per token)", "reward": "loss (nats per pair)", "dpo": "loss (nats per pair)"}
_MOST_POINTS = 300  # of one curve: more is more bytes and no more picture


def arms_chart(run: RunRecord) -> Chart | None:
    """Every arm's score on the deciding metric, with its interval."""
    rows = [(arm, found) for arm in run.arms if (found := run.estimate(arm))]
    if not rows:
        return None
    metric, scale = run.metric, _scale(run.metric)
    with drawing(rows=len(rows)) as figure:
        axes = figure.subplots()
        for y, (arm, score) in enumerate(reversed(rows)):
            draw_interval(axes, y, score, scale, color=_color(run, arm), marker=_MARKERS[run.kind(arm)])
            draw_note(axes, scale * score.high, y, words.metric_text(metric, score.value))
        label_rows(axes, [words.arm_label(run, arm) for arm, _ in reversed(rows)])
        low, high = min(scale * s.low for _, s in rows), max(scale * s.high for _, s in rows)
        chance = scale * _CHANCE[metric] if metric in _CHANCE else None
        low = min(low, chance or 0.0) if metric in words.SHARES else low - 0.05 * (high - low)
        if chance:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=":")
            low -= 0.03 * (high - low)
        axes.set_xlim(low, high + 0.17 * (high - low or 1.0))
        axes.set_xlabel(f"{_axis_label(metric)}, {basis(rows[0][1])}")
        if not higher_is_better(metric):
            axes.set_xlabel(axes.get_xlabel() + ", lower is better")
        _kinds_legend(figure, run, [arm for arm, _ in rows])
        told = "; ".join(f"{words.arm_label(run, arm)} {words.metric_text(metric, score.value)}" for arm, score in rows)
        return finish(figure, "arms", _ranking(run, rows), f"{metric} by arm: {told}.")


def differences_chart(run: RunRecord) -> Chart | None:
    """Paired differences of each tuned arm from each baseline, with the line of no difference."""
    rows = [row for row in run.contrasts() if row.get("a") in run.tuned and row.get("b") not in run.tuned]
    if not rows:
        return None
    metric, scale = run.metric, _scale(run.metric)
    sign = 1 if higher_is_better(metric) else -1
    tuned, baselines = (list(dict.fromkeys(str(row[side]) for row in rows)) for side in ("a", "b"))
    told, wins = [], []
    with drawing(rows=len(baselines) * (1 + 0.4 * (len(tuned) - 1))) as figure:
        axes = figure.subplots()
        for row in rows:
            found: Estimate = row["estimate"]
            y = len(baselines) - 1 - baselines.index(row["b"]) + 0.19 * (len(tuned) - 1) - 0.38 * tuned.index(row["a"])
            clear = found.low > 0 or found.high < 0
            wins += [row["a"]] * (clear and sign * found.value > 0)
            draw_interval(axes, y, found, scale, color=_color(run, row["a"]), marker="D", hollow=not clear)
            draw_note(axes, scale * found.high, y, words.difference_text(metric, found.value, unit=False))
            names = f"{words.arm_label(run, row['a'])} against {words.arm_label(run, row['b'])}"
            told.append(f"{names} {words.difference_text(metric, found.value)}")
        label_rows(axes, [words.arm_label(run, arm) for arm in reversed(baselines)])
        axes.set_ylim(-0.65, len(baselines) - 0.35)
        axes.axvline(0, color=INK, linewidth=1)
        low, high = min(0.0, *(row["estimate"].low for row in rows)), max(0.0, *(row["estimate"].high for row in rows))
        axes.set_xlim(scale * (low - 0.05 * (high - low)), scale * (high + 0.17 * (high - low or 1.0)))
        unit = "points" if scale == 100 else words.metric_label(metric)
        axes.set_xlabel(f"tuned {words.MINUS} baseline ({unit}), {basis(rows[0]['estimate'])}")
        figure.legend(
            handles=[legend_handle(words.arm_label(run, arm), _color(run, arm), "D") for arm in tuned],
            loc="outside lower center",
            ncols=len(tuned),
        )
        beaten = [f"{words.arm_label(run, arm)} beats {_share_of(wins.count(arm), len(baselines))}" for arm in tuned]
        alt = f"Paired differences in {metric}: {'; '.join(told)}. Hollow marks: the interval includes zero."
        return finish(figure, "differences", "; ".join(beaten), alt)


def curves_chart(run: RunRecord) -> Chart | None:
    """Training loss (light, smoothed), validation loss, and the validation metric below where it was measured."""
    arms = list(dict.fromkeys(str(step["arm"]) for step in run.steps if step.get("arm")))
    train = {arm: _curve(run.steps, arm, "loss") for arm in arms}
    valid = {arm: _curve(run.steps, arm, "valid_loss") for arm in arms}
    graded = {arm: _curve(run.steps, arm, "valid_metric") for arm in arms}
    metric = "pair_accuracy" if run.method == "dpo" else run.metric
    if not any(len(x) for x, _ in [*train.values(), *valid.values()]):
        return None
    panels = 2 if any(len(x) for x, _ in graded.values()) else 1
    scale = _scale(metric)
    with drawing(rows=3 + 4.4 * panels) as figure:
        top, *below = np.atleast_1d(figure.subplots(panels, sharex=True, height_ratios=[3, 2][:panels]))
        for arm in arms:
            color, label = _color(run, arm), words.arm_label(run, arm)
            steps, losses = _thin(*_smooth(*train[arm]))
            top.plot(steps, losses, color=color, alpha=0.4, linewidth=1.3, label=f"{label}, training (smoothed)")
            if len(valid[arm][0]):
                top.plot(*valid[arm], color=color, label=f"{label}, validation", **_LOOK)
            if below and len(graded[arm][0]):
                steps, values = graded[arm]
                below[0].plot(steps, scale * values, color=color, **_LOOK)
        top.set_ylabel(_LOSS_UNITS.get(run.method, "loss"))
        if below:
            below[0].set_ylabel(_axis_label(metric))
        for axes in (top, *below):
            rule(axes)
        (below[0] if below else top).set_xlabel("optimizer step")
        figure.legend(loc="outside lower center", ncols=min(2, 2 * len(arms)))
        ends = [f"{words.arm_label(run, a)} {y[0]:.3f} to {y[-1]:.3f}" for a, (x, y) in valid.items() if len(x) > 1]
        fell = all(y[-1] < y[0] for x, y in valid.values() if len(x) > 1)
        title = f"Validation loss {'fell' if fell else 'did not fall throughout'}: {', '.join(ends)}"
        title = title if ends else "Training loss by step"
        return finish(figure, "curves", title, f"Loss by optimizer step. {title}.")


def forgetting_chart(run: RunRecord) -> Chart | None:
    """General loss before and after tuning, and the most that the recipe allows."""
    rows = []
    for arm in run.tuned:
        measured = part(run.results, "forgetting", arm, "general_loss")
        before, after = as_estimate(part(measured, "before")), as_estimate(part(measured, "after"))
        if before and after:
            rows.append((arm, before, after))
    if not rows:
        return None
    limit = part(run.recipe, "evaluate", "forgetting_limit")
    with drawing(rows=len(rows) + 0.8) as figure:
        axes = figure.subplots()
        for y, (arm, before, after) in enumerate(reversed(rows)):
            axes.plot([before.value, after.value], [y, y], color=MUTED, linewidth=1, linestyle=":")
            draw_interval(axes, y + 0.12, before, 1, color=PROMPTED, marker="o")
            draw_interval(axes, y - 0.12, after, 1, color=_color(run, arm), marker="D")
        label_rows(axes, [words.arm_label(run, arm) for arm, _, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        handles = [legend_handle("before", PROMPTED, "o"), legend_handle("after", _color(run, rows[0][0]), "D")]
        if is_number(limit):
            axes.axvline(rows[0][1].value + limit, color=INK, linewidth=1.2, linestyle="--")
            handles.append(Line2D([], [], color=INK, linestyle="--", label=f"limit (before + {limit:g})"))
        axes.margins(x=0.06)
        axes.set_xlabel("general loss (nats per token), lower is better")
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        changes = [(words.arm_label(run, arm), after.value - before.value) for arm, before, after in rows]
        told = ", ".join(f"{name} {words.signed(f'{change:+.3f}')}" for name, change in changes)
        kept = is_number(limit) and all(change <= limit for _, change in changes)
        against = f", {'within' if kept else 'over'} the limit of {limit:g}" if is_number(limit) else ""
        title = f"General loss moved by {told} nats per token{against}"
        return finish(figure, "forgetting", title, title + ".")


def tokens_chart(run: RunRecord) -> Chart | None:
    """Prompt and completion tokens of one request, by arm."""
    rows = [(arm, facts) for arm, facts in run.arms.items() if is_number(facts.get("prompt_tokens_per_request"))]
    rows = [(arm, facts) for arm, facts in rows if facts["prompt_tokens_per_request"] > 0]
    if not rows:
        return None
    with drawing(rows=len(rows)) as figure:
        axes = figure.subplots()
        for y, (arm, facts) in enumerate(reversed(rows)):
            prompt, answer = facts["prompt_tokens_per_request"], facts.get("completion_tokens_per_request") or 0
            axes.barh(y, prompt, height=0.55, color=_color(run, arm))
            axes.barh(y, answer, left=prompt, height=0.55, color=_color(run, arm), alpha=0.4)
            text = f"{words.count(round(prompt))} + {words.count(round(answer))}"
            draw_note(axes, prompt + answer, y, text)
        label_rows(axes, [words.arm_label(run, arm) for arm, _ in reversed(rows)])
        widest = max(f["prompt_tokens_per_request"] + (f.get("completion_tokens_per_request") or 0) for _, f in rows)
        axes.set_xlim(0, 1.25 * widest)
        axes.set_xlabel("tokens per request: prompt, answer (light)")
        counts = {arm: facts["prompt_tokens_per_request"] for arm, facts in rows}
        title = "Tokens read and written per request"
        if run.subject in counts and run.prompted in counts:
            change = counts[run.subject] / counts[run.prompted] - 1
            fewer = f"{words.percent(abs(change))} {'fewer' if change <= 0 else 'more'} prompt tokens"
            title = f"{words.arm_label(run, run.subject)} reads {fewer} than {words.arm_label(run, run.prompted)}"
        told = "; ".join(f"{words.arm_label(run, arm)} {words.count(round(tokens))}" for arm, tokens in counts.items())
        return finish(figure, "tokens", title, f"Prompt tokens per request: {told}.")


def _ranking(run: RunRecord, rows: Sequence[tuple[str, Estimate]]) -> str:
    """The best arm and the next; arms that print the same number share the first place."""
    shown: dict[str, list[str]] = {}
    for arm, score in sorted(rows, key=lambda row: row[1].value, reverse=higher_is_better(run.metric)):
        shown.setdefault(words.metric_text(run.metric, score.value), []).append(words.arm_label(run, arm))
    (best, names), *others = shown.items()
    rest = f", then {' and '.join(others[0][1])} with {others[0][0]}" if others else ""
    return f"{' and '.join(names)} {'score' if len(names) > 1 else 'scores'} best with {best}{rest}"


def _curve(steps: Sequence[dict[str, Any]], arm: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """One column of the log by step; a step logged again after a resume counts once."""
    logged = (line for line in steps if line.get("arm") == arm and is_number(line.get("step")))
    points = {line["step"]: line[key] for line in logged if is_number(line.get(key))}
    ordered = sorted(points.items())
    return np.array([x for x, _ in ordered], dtype=float), np.array([y for _, y in ordered], dtype=float)


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean over a twenty-fifth of the curve; near the ends over what there is."""
    half = len(y) // 50
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first, last = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    return x, (sums[last] - sums[first]) / np.maximum(last - first, 1)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int)) if len(x) else slice(0)
    return x[keep], y[keep]


def _kinds_legend(figure: Figure, run: RunRecord, arms: Sequence[str]) -> None:
    names = {"prompted": "not tuned", "lookup": "lookup, no model", "tuned": "tuned"}
    first = {run.kind(arm): arm for arm in reversed(arms)}
    handles = [
        legend_handle(name, _color(run, first[kind]), _MARKERS[kind]) for kind, name in names.items() if kind in first
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _color(run: RunRecord, arm: str) -> str:
    if arm in run.tuned:
        return (TUNED, TUNED_TOO)[run.tuned.index(arm) % 2]
    return {"prompted": PROMPTED, "lookup": LOOKUP}.get(run.kind(arm), TUNED)


def _scale(metric: str) -> float:
    return 100.0 if metric in words.SHARES else 1.0


def _axis_label(metric: str) -> str:
    return words.metric_label(metric) + (" (%)" if metric in words.SHARES else "")


def basis(score: Estimate) -> str:
    """What an interval rests on: `95% interval, n = 200`."""
    return f"{words.level_text(score.level)} interval, n = {words.count(score.n)}"


def _share_of(wins: int, total: int) -> str:
    if total == 1:
        return "its baseline" if wins else "no baseline"
    return (
        f"{'both' if total == 2 else f'all {total}'} baselines"
        if wins == total
        else f"{wins or 'none'} of {total} baselines"
    )
