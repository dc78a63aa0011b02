"""What a page says of a student: whether it is as good as its teacher, without the prompt, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import words
from .findings import Tile, interval
from .record import RunRecord, as_estimate, is_number, part
from .tables import Cell, Table

_SAYS = {
    "equivalent": "is equivalent to the teacher",
    "at least as good": "is at least as good as the teacher",
    "worse": "is worse than the teacher",
}


def is_distilled(run: RunRecord) -> bool:
    """Whether the run compared a student with a teacher."""
    return as_estimate(part(run.results, "distill", "equivalence", "difference")) is not None


def finding(run: RunRecord) -> str:
    """One sentence: is the student as good, within which margin, by which interval, for how many prompt tokens less."""
    same: Mapping[str, Any] = part(run.results, "distill", "equivalence")
    found, metric = as_estimate(same["difference"]), run.metric
    assert found is not None
    student, teacher = run.estimate(run.subject or ""), run.estimate(run.prompted or "")
    told = words.metric_text(metric, student.value if student else None)
    before = words.metric_text(metric, teacher.value if teacher else None)
    says = _SAYS.get(str(same.get("finding")), "is not shown to be as good as the teacher")
    evidence = f"{words.difference_text(metric, found.value)}, {interval(metric, found, difference=True)}"
    name, rows = words.arm_label(run, run.subject or ""), f"{words.count(found.n)} held-out rows"
    saved = part(run.results, "savings", "prompt_tokens_saved_fraction")
    fewer = f", with {words.percent(saved)} fewer prompt tokens" if is_number(saved) and saved > 0 else ""
    score = f"{told} {words.metric_label(metric)} against {before} on {rows}"
    return f"{name} without the prompt {says}{fewer}: {score}; {evidence}, margin ±{_margin(run)}."


def tile(run: RunRecord) -> Tile:
    """The difference from the teacher against the margin."""
    same = part(run.results, "distill", "equivalence")
    found = as_estimate(part(same, "difference"))
    value = words.difference_text(run.metric, found.value if found else None, unit=False)
    bounds = interval(run.metric, found, difference=True) if found else words.ABSENT
    return Tile(
        label=f"student − teacher: {part(same, 'finding')}", value=value, note=f"{bounds}, margin ±{_margin(run)}"
    )


def table(run: RunRecord) -> Table:
    """Teacher, answers collected and left out, what they took."""
    facts: Mapping[str, Any] = part(run.results, "distill") or {}
    took: Mapping[str, Any] = facts.get("spent") or {}
    dropped: Mapping[str, Any] = facts.get("dropped") or {}
    lines = [
        ("teacher", " at ".join(str(name) for name in (facts.get("model"), facts.get("teacher")) if name)),
        ("test answers judged by", str(facts.get("judged_by", ""))),
        ("inputs", words.count(facts.get("inputs"))),
        ("answers asked for", words.count(facts.get("answers"))),
        *((f"left out: {reason}", words.count(rows)) for reason, rows in dropped.items()),
        ("prompt tokens read by the teacher", words.count(took.get("prompt_tokens"))),
        ("answer tokens written by it", words.count(took.get("completion_tokens"))),
        ("cost at the prices given", f"{took['cost']:,.2f}" if is_number(took.get("cost")) else ""),
    ]
    rows = [[Cell(text=name), Cell(text=value)] for name, value in lines if value] if is_distilled(run) else []
    return Table(columns=["collecting answers", ""], rows=rows)


def _margin(run: RunRecord) -> str:
    margin = part(run.results, "distill", "equivalence", "margin")
    return words.difference_text(run.metric, margin).removeprefix("+")
