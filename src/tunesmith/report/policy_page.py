"""The page of a policy tuned on preferences: does it win against its base, how far from it, at what side effects?"""

from __future__ import annotations

from collections.abc import Sequence

from ..types import FEWEST_ROWS, Estimate
from . import examples, findings, policy_charts, tables, words
from .content import Page
from .examples import ShownAnswer, ShownRow
from .findings import Tile
from .record import Json, RunRecord, as_estimate, is_number, part

_SECTIONS = {
    "result": "Result",
    "distance": "Over-optimisation",
    "examples": "Examples",
    "cost": "Cost",
    "forgetting": "Forgetting",
    "training": "Training",
    "plan": "Plan",
    "data": "Data",
    "reproduce": "Reproduce",
}
_BASE = "base"
_BRIEF = ("reward_score", "reward", "length_tokens", "unended")  # beside the deciding metric, in the terminal


def policy_page(run: RunRecord) -> Page:
    """What a dpo, ppo or grpo run found."""
    gains = _gains(run)
    measured = [m for m in _BRIEF if m != run.metric and any(run.estimate(arm, m) for arm in run.arms)]
    return Page(
        template="policy_page.html.j2",
        finding=_finding(run),
        reasons=findings.reasons(run),
        tiles=_tiles(run),
        brief=tables.brief_table(run, {words.metric_label(m): lambda arm, m=m: _value(run, arm, m) for m in measured}),
        sections=_SECTIONS,
        charts=({} if _is_judged(run) else {"arms": None, "differences": None})
        | {
            "over_optimisation": policy_charts.over_optimisation_chart(run),
            "side_effects": policy_charts.side_effects_chart(run),
            "rollouts": policy_charts.rollouts_chart(run),
        },
        more={
            "base": _base(run),
            "judge": _judge(run),
            "asked": _asked(run, 0),
            "prompts_trained": part(run.results, "data", "split_by") == "answer",
            "method": run.method,
            "setbacks": _setbacks(run),
            "metric_label": words.metric_label(run.metric),
            "has_judge": any(is_number(point.get("judge_score")) for point in run.lines("curve")),
            "outcomes": examples.tally(_counts(gains) if _is_judged(run) else {}),
            "examples": _shown_rows(run, gains),
        },
    )


def _finding(run: RunRecord) -> str:
    """The win rate, by whom, and how far from the base; without one, what the deciding metric says."""
    won, away = as_estimate(part(run.results, "win_rate")), as_estimate(part(run.results, "kl"))
    if run.subject is None or (won is None and _is_judged(run)):
        return findings.finding(run)
    name = f"{words.METHODS[run.method]} with {words.arm_label(run, run.subject)}"
    if won is None:
        moved = f"{_nats(away.value)} nats per sequence" if away else "an unmeasured distance"
        return f"{name} moved the model {moved} away from {_base(run)}. Nothing judged its answers."
    share = words.metric_text("win_rate", won.value)
    told = f"{share} of {_asked(run, won.n)} by {_judge(run)} ({findings.interval('win_rate', won)})"
    distance = f", {_nats(away.value)} nats per sequence away from it" if away else ""
    if won.low > 0.5 and won.n >= FEWEST_ROWS:
        return f"{name} wins against {_base(run)} on {told}{distance}."
    verb = "loses to" if won.high < 0.5 and won.n >= FEWEST_ROWS else "is not shown to win against"
    return f"{name} {verb} {_base(run)}: it wins on {told}{distance}."


def _nats(value: float) -> str:
    """A distance as estimated from answers drawn, which may come out a little below 0."""
    return words.signed(f"{round(value, 1) + 0.0:.1f}")


def _asked(run: RunRecord, n: int) -> str:
    return str(part(run.results, "asked") or f"{words.count(n)} held-out prompts")


def _tiles(run: RunRecord) -> list[Tile]:
    subject = run.subject
    if subject is None:
        return []
    won, away = as_estimate(part(run.results, "win_rate")), as_estimate(part(run.results, "kl"))
    far = f"nats per sequence, {_nats(away.low)} to {_nats(away.high)}" if away else "not measured"
    return [
        findings.estimate_tile(f"win rate by {_judge(run)}", "win_rate", won),
        findings.gain_tile(run, subject if _is_judged(run) else None, _BASE),
        Tile(label="distance from the base (KL)", value=_nats(away.value) if away else words.ABSENT, note=far),
        _length_tile(run, subject),
        findings.cost_tile(run),
    ]


def _length_tile(run: RunRecord, subject: str) -> Tile:
    before, after = (run.estimate(arm, "length_tokens") for arm in (_BASE, subject))
    if before is None or after is None or not before.value:
        return Tile(label="answer length", value=words.ABSENT, note="not measured")
    change = words.signed(f"{100 * (after.value / before.value - 1):+.0f}%")
    told = " to ".join(words.metric_text("length_tokens", one.value) for one in (before, after))
    return Tile(label="answer length", value=change, note=f"{told} tokens")


def _setbacks(run: RunRecord) -> str:
    """What the rollouts counted and could not learn from; empty where there was nothing of the kind."""
    counts = {"unscored answers": "unscored", "groups whose answers all scored alike": "alike"}
    lines = run.lines("rollouts")
    totals = {what: sum(line[key] for line in lines if is_number(line.get(key))) for what, key in counts.items()}
    told = ", ".join(f"{what}: {words.count(total)}" for what, total in totals.items() if total)
    return f"Over all rollouts, {told}." if told else ""


def _value(run: RunRecord, arm: str, metric: str) -> str:
    found: Estimate | None = run.estimate(arm, metric)
    return words.metric_text(metric, found.value if found else None)


def _base(run: RunRecord) -> str:
    """What the policy started from, by the name in the recipe."""
    return str(run.results.get("base") or part(run.recipe, "base") or "its base model")


def _judge(run: RunRecord) -> str:
    """Who compared the answers."""
    by = part(run.results, "win_rate_by")
    if by in (None, "judge"):
        return "the judge"
    learned = "the reward function" if by == "reward" else "the reward model"
    return learned if run.method == "dpo" else "the reward it was trained on"


def _is_judged(run: RunRecord) -> bool:
    """Whether the deciding metric says which of two answers is better."""
    return run.metric not in ("", "length_tokens")


def _gains(run: RunRecord) -> dict[str, float]:
    """Prompt id to score of the tuned answer minus score of the base's, on the deciding metric."""
    before, after = (
        {str(line.get("id")): part(line, "scores", run.metric) for line in run.answers.get(arm or "", ())}
        for arm in (_BASE, run.subject)
    )
    shared = [row for row in after if is_number(after[row]) and is_number(before.get(row))]
    return {row: after[row] - before[row] for row in shared}


def _counts(gains: dict[str, float]) -> dict[str, int]:
    won, lost = sum(gain > 0 for gain in gains.values()), sum(gain < 0 for gain in gains.values())
    return {"won by tuning": won, "lost by tuning": lost, "tied": len(gains) - won - lost}


def _shown_rows(run: RunRecord, gains: dict[str, float], each: int = 3) -> list[ShownRow]:
    """The largest wins, the largest losses, and prompts drawn by hash and seed from the rest."""
    ordered = sorted(gains, key=lambda row: (-gains[row], row))
    judged = _is_judged(run)
    wins = [row for row in ordered[:each] if judged and gains[row] > 0]
    losses = [row for row in ordered[::-1][:each] if judged and gains[row] < 0]
    rest = examples.shuffled(set(gains) - {*wins, *losses}, part(run.recipe, "evaluate", "seed"))[:each]
    by_arm = [
        (arm, {str(line.get("id")): line for line in run.answers[arm]}) for arm in (_BASE, run.subject or "") if gains
    ]
    groups = (("mended", "largest win", wins), ("broken", "largest loss", losses), ("", "drawn at random", rest))
    return [
        ShownRow(
            id=row,
            outcome=outcome,
            label=f"{label}: {words.difference_text(run.metric, gains[row])}" if judged else label,
            prompt=examples.clip(examples.prompt_text(by_arm[0][1][row].get("prompt")), examples.PROMPT_CHARACTERS),
            reference="",
            answers=tuple(_answer(run, arm, lines[row]) for arm, lines in by_arm),
        )
        for outcome, label, rows in groups
        for row in rows
    ]


def _answer(run: RunRecord, arm: str, line: Json) -> ShownAnswer:
    return ShownAnswer(
        label=words.arm_label(run, arm),
        kind=run.kind(arm),
        text=examples.clip(str(line.get("answer", "")), examples.PROMPT_CHARACTERS),
        score=", ".join(_scores(run.metric, line)),
        mark="",
    )


def _scores(deciding: str, line: Json) -> Sequence[str]:
    """Both models' scores of one answer, the deciding one first."""
    metrics = dict.fromkeys([deciding, "judge_score", "reward_score", "reward"])
    found = {metric: part(line, "scores", metric) for metric in metrics}
    return [f"{words.metric_label(m)} {words.metric_text(m, score)}" for m, score in found.items() if is_number(score)]
