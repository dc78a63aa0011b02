"""The report's tables as plain data: the template decides how they look. A table with no rows is not shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import words
from .record import RunRecord, as_estimate, is_number, part


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table cell: the text, a quieter second line, and `kind` for a coloured mark or a class of its own."""

    text: str
    note: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells. `words` counts the leading columns that hold words; the others hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


def scores_table(run: RunRecord) -> Table:
    """Arms by metrics, with intervals; the deciding metric first."""
    named = [metric for arm in run.arms.values() for metric in part(arm, "metrics") or {}]
    metrics = [metric for metric in dict.fromkeys([run.metric, *named]) if metric in named]
    rows = []
    for arm in run.arms:
        cells = [_arm_cell(run, arm)]
        for metric in metrics:
            found = run.estimate(arm, metric)
            bounds = words.interval_text(metric, found) if found else ""
            cells.append(Cell(text=words.metric_text(metric, found.value if found else None), note=bounds))
        rows.append(cells)
    return Table(columns=["arm", *map(words.metric_label, metrics)], rows=rows if metrics else [])


def brief_table(run: RunRecord, more: Mapping[str, Callable[[str], str]]) -> Table:
    """Arms with the deciding metric alone and `more` columns, each a function of the arm: for the terminal."""
    rows = []
    for arm in run.arms:
        score = run.estimate(arm)
        shown = words.metric_text(run.metric, score.value if score else None)
        bounds = words.interval_text(run.metric, score) if score else words.ABSENT
        texts = (shown, bounds, *(show(arm) for show in more.values()))
        rows.append([_arm_cell(run, arm), *(Cell(text=text) for text in texts)])
    return Table(columns=["arm", words.metric_label(run.metric), "interval", *more], rows=rows)


def contrasts_table(run: RunRecord) -> Table:
    """Every paired difference, the deciding metric first, with its interval and p-value."""
    rows = []
    for row in sorted(run.lines("contrasts"), key=lambda row: row.get("metric") != run.metric):
        found, metric = as_estimate(row.get("difference")), str(row.get("metric", ""))
        if found is None:
            continue
        texts = (
            f" {words.MINUS} ".join(words.arm_label(run, str(row.get(side))) for side in ("a", "b")),
            words.metric_label(metric),
            words.difference_text(metric, found.value),
            words.interval_text(metric, found, difference=True),
            words.p_value(row.get("p_value")),
            words.count(found.n),
        )
        rows.append([Cell(text=text) for text in texts])
    return Table(columns=["difference", "metric", "value", "interval", "p", "rows"], rows=rows, words=2)


def requests_table(run: RunRecord) -> Table:
    """What answering costs, by arm."""
    rows = [
        [
            _arm_cell(run, arm),
            Cell(text=words.count(facts.get("prompt_tokens_per_request"))),
            Cell(text=words.count(facts.get("completion_tokens_per_request"))),
            Cell(text=words.seconds(facts.get("seconds"))),
        ]
        for arm, facts in run.arms.items()
        if is_number(facts.get("prompt_tokens_per_request")) and run.kind(arm) != "lookup"
    ]
    columns = ["arm", "prompt tokens per request", "answer tokens per request", "time for the test rows"]
    return Table(columns=columns, rows=rows)


def training_table(run: RunRecord) -> Table:
    """What training cost: one column per tuned arm, so that two can be read side by side."""
    lines = (
        ("time in the loop", "seconds", words.seconds),
        ("rollouts", "rollouts", words.count),
        ("tokens", "tokens", words.count),
        ("compute", "flops", words.flops),
        ("peak memory", "peak_memory_bytes", words.size),
        ("trained parameters", "trainable_parameters", words.count),
        ("learning rate", "learning_rate", words.plain),
        ("checkpoint", "checkpoint_bytes", words.size),
    )
    rows = [
        [Cell(text=name), *(Cell(text=show(part(run.arms, arm, "train", key))) for arm in run.tuned)]
        for name, key, show in lines
        if any(is_number(part(run.arms, arm, "train", key)) for arm in run.tuned)
    ]
    labels = [words.arm_label(run, arm) for arm in run.tuned]
    return Table(columns=["training", *labels], rows=rows if labels else [])


def forgetting_table(run: RunRecord) -> Table:
    """General ability before and after tuning; a measure without a before shows its value alone."""
    rows = []
    for arm, measures in (part(run.results, "forgetting") or {}).items():
        for name, measured in (measures if isinstance(measures, Mapping) else {}).items():
            before, change = as_estimate(part(measured, "before")), as_estimate(part(measured, "change"))
            after = as_estimate(part(measured, "after")) or as_estimate(measured)
            if before is None and after is None and change is None:
                continue
            moved = change.value if change else after.value - before.value if before and after else None
            rows.append(
                [
                    Cell(text=words.arm_label(run, arm)),
                    Cell(text=words.metric_label(name)),
                    *(_estimate_cell(name, found) for found in (before, after)),
                    Cell(
                        text=words.difference_text(name, moved),
                        note=words.interval_text(name, change, difference=True) if change else "",
                    ),
                ]
            )
    return Table(columns=["arm", "measure", "before", "after", "change"], rows=rows, words=2)


def plan_table(run: RunRecord) -> Table:
    """Planned against measured time, memory and compute."""
    rows = []
    for arm in run.tuned:
        predicted, measured = run.planned(arm)
        lines = (
            ("time", "seconds", words.seconds),
            ("peak memory", "peak_memory_bytes", words.size),
            ("compute", "flops", words.flops),
        )
        for name, key, show in lines:
            before, after = predicted.get(key), measured.get(key)
            if is_number(before):
                ratio = f"×{after / before:.2f}" if is_number(after) and before else words.ABSENT
                texts = (words.arm_label(run, arm), name, show(before), show(after), ratio)
                rows.append([Cell(text=text) for text in texts])
    return Table(columns=["arm", "quantity", "planned", "measured", "ratio"], rows=rows, words=2)


def data_table(run: RunRecord) -> Table:
    """Rows read, kept, dropped and flagged by reason, and the splits."""
    census, data = run.results.get("census") or {}, run.results.get("data") or {}
    lines: list[tuple[str, Any]] = [("read", census.get("read"))]
    lines += [(f"dropped: {reason}", rows) for reason, rows in (census.get("dropped") or {}).items()]
    lines += [("kept", census.get("kept"))]
    lines += [(f"flagged, kept: {reason}", rows) for reason, rows in (census.get("flagged") or {}).items()]
    splits = (("train", "training"), ("valid", "validation"), ("test", "test"))
    lines += [(f"{name} split", data.get(key)) for key, name in splits]
    rows = [[Cell(text=name), Cell(text=words.count(value))] for name, value in lines if is_number(value)]
    return Table(columns=["rows", "number"], rows=rows)


def ledger_table(run: RunRecord) -> Table:
    """The ledger by action and reason, each with its first row as an example."""
    rows = [
        [
            Cell(text=group.action),
            Cell(text=group.reason),
            Cell(text=group.source, note=group.detail[:160], kind="code"),
            Cell(text=words.count(group.rows)),
        ]
        for group in run.ledger
    ]
    return Table(columns=["action", "reason", "for example", "rows"], rows=rows, words=3)


def derived_table(run: RunRecord) -> Table:
    """Values that the recipe left open, what was chosen, and why."""
    rows = [
        [
            Cell(text=str(row.get("key", "")), kind="code key"),
            Cell(text=words.plain(row.get("value"))),
            Cell(text=str(row.get("reason", "")), kind="prose"),
        ]
        for row in part(run.plan, "derived") or []
        if isinstance(row, Mapping)
    ]
    return Table(columns=["key", "value", "reason"], rows=rows, words=3)


def origin_table(run: RunRecord) -> Table:
    """Versions, machine and seeds: what a repetition needs."""
    machine = run.results.get("machine") or run.plan.get("machine") or {}
    seeds = {"data": "splits", "train": "training", "evaluate": "evaluation"}
    whole = "since it was resumed" if run.plan.get("resumed") else "whole run"
    told = [f"{name} {seed}" for key, name in seeds.items() if is_number(seed := part(run.recipe, key, "seed"))]
    lines = (
        ("Tunesmith", run.results.get("tunesmith")),
        ("PyTorch", machine.get("torch")),
        ("base model", run.results.get("base") or part(run.recipe, "base")),
        ("about the base", "; ".join(run.plan.get("base_notes") or ())),
        ("processor", machine.get("cpu")),
        ("cores, threads", " / ".join(words.plain(machine[key]) for key in ("cores", "threads") if machine.get(key))),
        ("memory", words.size(machine["memory_bytes"]) if is_number(machine.get("memory_bytes")) else None),
        ("device", machine.get("device")),
        ("seeds", ", ".join(told)),
        (whole, words.seconds(run.results["seconds"]) if is_number(run.results.get("seconds")) else None),
    )
    rows = [[Cell(text=name), Cell(text=str(value))] for name, value in lines if value]
    return Table(columns=["", ""], rows=rows, words=2)


def _arm_cell(run: RunRecord, arm: str) -> Cell:
    second = arm in run.tuned and run.tuned.index(arm) % 2 == 1
    return Cell(text=words.arm_label(run, arm), kind="tuned-too" if second else run.kind(arm))


def _estimate_cell(metric: str, found: Any) -> Cell:
    if found is None:
        return Cell(text=words.ABSENT)
    return Cell(text=words.metric_text(metric, found.value), note=words.interval_text(metric, found))
