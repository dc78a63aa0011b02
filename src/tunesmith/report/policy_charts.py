"""What only a policy's page draws: scores against distance from the base, side effects, and the training rollouts.

A reward model is a stand-in for what people want. Past some distance its score goes on rising while the answers get
worse (Gao et al. 2022, arXiv 2210.10760), which only a second model that never trained the policy can show: the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import words
from .drawing import INK, LOOKUP, MUTED, PROXY, TUNED, TUNED_TOO, Chart, drawing, finish, rule
from .record import Json, RunRecord, is_number, part

_PROXIES = ("reward_score", "reward")  # of a reward model, of the user's own function
_LOOKS = {"judge_score": (TUNED_TOO, "D", "-"), **dict.fromkeys(_PROXIES, (PROXY, "s", "--"))}
_KL = "KL from the base model (nats per sequence)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small chart of a stack: a key of the points, its label, and the key of a half-width to shade, if any."""

    key: str
    label: str
    spread: str = ""
    scale: float = 1.0


_SIDE_EFFECTS = (
    Panel(key="win_rate", label="win rate (%)", scale=100),
    Panel(key="length_tokens", label="answer tokens"),
    Panel(key="repetition", label="repetition (%)", scale=100),
)
_ROLLOUTS = (
    Panel(key="score", label="score", spread="score_sd"),
    Panel(key="kl", label="KL (nats)"),
    Panel(key="entropy", label="entropy (nats)"),
    Panel(key="unended", label="cut off (%)", scale=100),
)


def over_optimisation_chart(run: RunRecord) -> Chart | None:
    """Proxy and judge on validation prompts against KL from the base, the chosen checkpoint marked."""
    points = _by_distance(run)
    drawn = {key: kept for key in _LOOKS if len(kept := _with(points, key)) > 1}
    if not drawn:
        return None
    with drawing(rows=8.2) as figure:
        axes = figure.subplots()
        for key, kept in drawn.items():
            color, marker, line = _LOOKS[key]
            xs, ys = _column(kept, "kl"), _column(kept, key)
            label = (
                "proxy: the reward trained on" if key in _PROXIES and run.method != "dpo" else words.metric_label(key)
            )
            axes.plot(xs, ys, color=color, marker=marker, markersize=5.5, linewidth=2, linestyle=line, label=label)
        _mark_chosen(axes, points, label=True)
        _mark_limit(axes, points, part(run.recipe, "policy", "kl_limit"))
        rule(axes)
        axes.margins(y=0.12)
        axes.set_xlabel(_KL)
        axes.set_ylabel("mean score, validation prompts")
        figure.legend(loc="outside lower center", ncols=2)
        told = _told([Panel(key=key, label=words.metric_label(key)) for key in drawn], points)
        return finish(figure, "over-optimisation", _followed(run), f"Mean score against KL from the base: {told}")


def side_effects_chart(run: RunRecord) -> Chart | None:
    """Win rate, length and repetition over the same distance."""
    points = _by_distance(run)
    panels = _drawable(_SIDE_EFFECTS, points)
    if not panels:
        return None
    with drawing(rows=8.2) as figure:
        for axes in _stack(figure, panels, points, "kl", _KL, marker="o"):
            _mark_chosen(axes, points)
        kept = _with(points, "length_tokens")
        title = "What changed beside the score"
        if kept:
            at = _chosen(kept) or kept[-1]
            title = f"Answers went from {kept[0]['length_tokens']:.0f} to {at['length_tokens']:.0f} tokens"
        return finish(figure, "side-effects", title, _told(panels, points))


def rollouts_chart(run: RunRecord) -> Chart | None:
    """Score, KL, entropy and unfinished answers of the training rollouts."""
    points = _with(run.lines("rollouts"), "rollout")
    panels = _drawable(_ROLLOUTS, points)
    if not panels:
        return None
    with drawing(rows=2 + 2.9 * len(panels)) as figure:
        _stack(figure, panels, points, "rollout", "rollout")
        ends = [words.metric_text("score", point["score"]) for point in _with(points, "score")]
        title = f"Training rollouts: score {ends[0]} to {ends[-1]}" if ends else "Training rollouts"
        return finish(figure, "rollouts", title, _told(panels, points))


def _followed(run: RunRecord) -> str:
    """What the chosen checkpoint gained by proxy and by judge, and whether the two had parted at the farthest look."""
    points = _by_distance(run)
    proxy_key = next((key for key in _PROXIES if _with(points, key)), _PROXIES[0])
    chosen, both = _chosen(points), _with(_with(points, "judge_score"), proxy_key)
    if not _with(points, "judge_score"):
        trained = "The reward that was trained on, with no judge beside it"
        return trained if run.method != "dpo" else "Mean score by distance from the base"
    if not both or chosen not in both:
        return "Judge and proxy by distance from the base"
    first, last = both[0], both[-1]
    judge, proxy = (words.difference_text(key, chosen[key] - first[key]) for key in ("judge_score", proxy_key))
    title = f"Chosen at {chosen['kl']:.1f} nats: judge {judge}, proxy {proxy}"
    if last["judge_score"] < chosen["judge_score"] and last[proxy_key] > chosen[proxy_key]:
        title += "; farthest out the proxy was higher, the judge lower"
    return title


def _stack(
    figure: Figure, panels: Sequence[Panel], points: Sequence[Json], x: str, x_label: str, *, marker: str = ""
) -> list[Axes]:
    """Small charts above each other over one column of the points."""
    stack = list(np.atleast_1d(figure.subplots(len(panels), sharex=True)))
    for axes, panel in zip(stack, panels, strict=True):
        _draw(axes, panel, points, x, marker=marker)
    stack[-1].set_xlabel(x_label)
    figure.align_ylabels()
    return stack


def _draw(axes: Axes, panel: Panel, points: Sequence[Json], x: str, *, marker: str = "") -> None:
    kept = _with(points, panel.key)
    xs, ys = _column(kept, x), panel.scale * _column(kept, panel.key)
    if panel.spread and len(_with(kept, panel.spread)) == len(kept):
        spread = panel.scale * _column(kept, panel.spread)
        axes.fill_between(xs, ys - spread, ys + spread, color=LOOKUP, alpha=0.16, linewidth=0)
    axes.plot(xs, ys, color=TUNED, marker=marker, markersize=4.5, linewidth=1.8)
    axes.set_ylabel(panel.label)
    axes.margins(y=0.15)
    if panel.key == "win_rate":
        axes.axhline(50, color=INK, linewidth=0.8, linestyle=":")
    if panel.key == "unended":
        axes.set_ylim(bottom=0.0)
    rule(axes)


def _mark_chosen(axes: Axes, points: Sequence[Json], *, label: bool = False) -> None:
    chosen = _chosen(points)
    if chosen is None:
        return
    axes.axvline(chosen["kl"], color=INK, linewidth=1, linestyle=":")
    if label:
        step = f", step {words.count(chosen['step'])}" if is_number(chosen.get("step")) else ""
        late = chosen["kl"] > 0.6 * max(point["kl"] for point in points)
        look = {"xytext": (-6 if late else 6, 3), "textcoords": "offset points", "ha": "right" if late else "left"}
        where = (chosen["kl"], 0)
        axes.annotate(f"chosen{step}", where, xycoords=("data", "axes fraction"), color=MUTED, fontsize=10, **look)


def _mark_limit(axes: Axes, points: Sequence[Json], limit: Any) -> None:
    """The distance from which on no look could be chosen, where there was one."""
    if is_number(limit) and any(point.get("beyond_limit") for point in points):
        axes.axvline(limit, color=MUTED, linewidth=1)
        look = {"xytext": (4, -12), "textcoords": "offset points", "color": MUTED, "fontsize": 10}
        axes.annotate("policy.kl_limit", (limit, 1), xycoords=("data", "axes fraction"), **look)


def _drawable(panels: Sequence[Panel], points: Sequence[Json]) -> list[Panel]:
    return [panel for panel in panels if len(_with(points, panel.key)) > 1]


def _told(panels: Sequence[Panel], points: Sequence[Json]) -> str:
    ends = ((panel, _with(points, panel.key)) for panel in panels)
    told = (f"{p.label} from {p.scale * k[0][p.key]:.3g} to {p.scale * k[-1][p.key]:.3g}" for p, k in ends)
    return f"{'; '.join(told)}.".replace("-", words.MINUS)


def _by_distance(run: RunRecord) -> list[Json]:
    """The looks at validation prompts, nearest to the base first."""
    return sorted(_with(run.lines("curve"), "kl"), key=lambda point: point["kl"])


def _chosen(points: Sequence[Json]) -> Json | None:
    return next((point for point in points if point.get("chosen") is True), None)


def _with(points: Sequence[Json], key: str) -> list[Json]:
    return [point for point in points if is_number(point.get(key))]


def _column(points: Sequence[Json], key: str) -> np.ndarray:
    return np.array([point[key] for point in points], dtype=float)
