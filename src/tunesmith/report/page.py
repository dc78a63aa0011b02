"""`report.html`: one page that says whether tuning worked, what it cost, and how to check it. No script, no request.

Everything a user or a model wrote is escaped by the template; only the charts' SVG, drawn here, goes in as it is, and a
content security policy forbids scripts besides. The terminal gets the same verdict in a few lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..folder import RunFolder, write_text
from . import charts, examples, findings, tables, words
from .record import RunRecord, is_number, part, read_record

_TEMPLATE = "page.html.j2"
_BADGES = {"ship": "✓", "do not ship": "✕", "not shown": "?"}
_STYLES = {"ship": "green", "do not ship": "red", "not shown": "yellow"}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Raises FolderError for an unreadable folder."""
    run = read_record(folder)
    target = RunFolder(path=run.folder).report
    write_text(target, render_page(run))
    return target


def render_page(run: RunRecord) -> str:
    """The page as text. The same run gives the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(_TEMPLATE).render(**_content(run))


def print_report(folder: Path, console: Console) -> None:
    """Print verdict, finding, scores and costs of a run folder. Raises FolderError for an unreadable folder."""
    run = read_record(folder)
    decision = findings.decision(run)
    text = Text(findings.finding(run))
    for reason in findings.reasons(run):
        text.append(f"\n• {reason}", style="dim")
    style = _STYLES.get(decision, "yellow")
    title = Text(decision.upper(), style=f"bold {style}")
    console.print(Panel(text, title=title, title_align="left", border_style=style))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(("arm", run.metric, "interval", "prompt tokens")):
        table.add_column(Text(column), justify="right" if number else "left")
    for arm, facts in run.arms.items():
        score = run.estimate(arm)
        cells = (
            words.arm_label(run, arm),
            words.metric_text(run.metric, score.value if score else None),
            words.interval_text(run.metric, score) if score else words.ABSENT,
            words.count(facts.get("prompt_tokens_per_request") if run.kind(arm) != "lookup" else None),
        )
        table.add_row(*map(Text, cells), style="bold" if arm in run.tuned else "")
    console.print(table)
    for tile in findings.tiles(run)[2:]:
        console.print(Text(f"{tile.label}: {tile.value} ({tile.note})"))
    if (report := RunFolder(path=run.folder).report).is_file():
        console.print(Text(f"report: {report}"))


def _content(run: RunRecord) -> dict[str, Any]:
    """Everything the template names."""
    decision = findings.decision(run)
    groups = examples.outcomes(run)
    total = sum(map(len, groups.values()))
    return {
        "title": part(run.results, "task", "name") or run.folder.resolve().name,
        "setting": findings.setting(run),
        "decision": decision,
        "badge": _BADGES.get(decision, "?"),
        "finding": findings.finding(run),
        "reasons": findings.reasons(run),
        "tiles": findings.tiles(run),
        "charts": {name: _inline(draw(run)) for name, draw in _CHARTS.items()},
        "tables": {name: build(run) for name, build in _TABLES.items()},
        "level": _level(run),
        "smallest_difference": _smallest_difference(run),
        "instructions": part(run.results, "task", "instructions") or part(run.recipe, "task", "instructions") or "",
        "break_even": _break_even(run),
        "lora_against_full": findings.lora_against_full(run),
        "test_reads": run.results.get("test_reads"),
        "outcomes": [
            (examples.OUTCOMES[name], len(rows), words.percent(len(rows) / total)) for name, rows in groups.items()
        ],
        "outcome_labels": examples.OUTCOMES,
        "subject": words.arm_label(run, run.subject) if run.subject else "",
        "prompted": words.arm_label(run, run.prompted) if run.prompted else "",
        "examples": examples.shown_rows(run),
        "metric": run.metric,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
    }


_CHARTS = {
    "arms": charts.arms_chart,
    "differences": charts.differences_chart,
    "tokens": charts.tokens_chart,
    "forgetting": charts.forgetting_chart,
    "curves": charts.curves_chart,
    "plan": charts.plan_chart,
}
_TABLES = {
    "scores": tables.scores_table,
    "contrasts": tables.contrasts_table,
    "requests": tables.requests_table,
    "training": tables.training_table,
    "fractions": tables.fractions_table,
    "forgetting": tables.forgetting_table,
    "plan": tables.plan_table,
    "data": tables.data_table,
    "ledger": tables.ledger_table,
    "derived": tables.derived_table,
    "origin": tables.origin_table,
}


def _inline(chart: charts.Chart | None) -> dict[str, Any] | None:
    return {"title": chart.title, "svg": Markup(chart.svg)} if chart else None  # noqa: S704, drawn by charts.py


def _level(run: RunRecord) -> str:
    levels = [found.level for arm in run.arms if (found := run.estimate(arm))]
    return words.percent(levels[0]) if levels else "95%"


def _smallest_difference(run: RunRecord) -> str:
    """The least gain this test set can show, as recorded in results or plan."""
    found = run.results.get("smallest_difference") or run.plan.get("smallest_difference")
    value = part(found, "value")
    if not is_number(value):
        return ""
    told = words.difference_text(run.metric, value).removeprefix("+")
    explanation = part(found, "explanation")
    return f"The smallest difference this test set can show is {told}{f' ({explanation})' if explanation else ''}."


def _break_even(run: RunRecord) -> str:
    """How the break-even point follows from the tokens saved."""
    saving = part(run.results, "savings")
    fraction, requests = part(saving, "prompt_tokens_saved_fraction"), part(saving, "break_even_requests")
    if not is_number(fraction):
        return "Tokens per request were not compared between a tuned and a prompted arm, so no saving is known."
    against = words.arm_label(run, part(saving, "prompted") or run.prompted or "the best prompt")
    tuned = words.arm_label(run, part(saving, "tuned") or run.subject or "the tuned arm")
    if fraction <= 0:
        more = f"{words.percent(-fraction)} more" if fraction < 0 else "as many"
        return f"A request to {tuned} reads {more} prompt tokens than {against}: training is not repaid in tokens."
    told = f"A request to {tuned} reads {words.percent(fraction)} fewer prompt tokens than {against}."
    if not is_number(requests):
        return f"{told} The compute of training is not known, so neither is the break-even point."
    return (
        f"{told} At 2 floating-point operations per parameter and token, training is repaid after about "
        f"{words.rounded_count(requests)} requests. A server that caches prompt prefixes saves part of these "
        "tokens without tuning, which moves that point further out."
    )
