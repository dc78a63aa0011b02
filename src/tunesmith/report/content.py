"""What a page is made of: the parts that every method shares, and the form in which a method adds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from markupsafe import Markup

from . import charts, exports, findings, tables, words
from .drawing import Chart
from .findings import Tile
from .record import RunRecord
from .tables import Table

_BADGES = {"ship": "✓", "do not ship": "✕", "not shown": "?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one method says of a run. `brief` is the terminal's table; `more` is what its own template names."""

    template: str
    finding: str
    reasons: Sequence[str]
    tiles: Sequence[Tile]
    brief: Table
    sections: Mapping[str, str]
    charts: Mapping[str, Chart | None]
    tables: Mapping[str, Table] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


def content(run: RunRecord, page: Page) -> dict[str, Any]:
    """Everything that a page's template names."""
    decision = findings.decision(run)
    return {
        "title": run.folder.resolve().name,
        "setting": findings.setting(run),
        "decision": decision,
        "badge": _BADGES.get(decision, "?"),
        "finding": page.finding,
        "reasons": page.reasons,
        "tiles": page.tiles,
        "sections": page.sections.items(),
        "charts": {name: _inline(chart) for name, chart in (_shared_charts(run) | dict(page.charts)).items()},
        "tables": {name: build(run) for name, build in _TABLES.items()} | dict(page.tables),
        "level": _level(run),
        "metric": run.metric,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        **page.more,
    }


def _shared_charts(run: RunRecord) -> dict[str, Chart | None]:
    return {
        "arms": charts.arms_chart(run),
        "differences": charts.differences_chart(run),
        "forgetting": charts.forgetting_chart(run),
        "curves": charts.curves_chart(run),
    }


_TABLES = {
    "scores": tables.scores_table,
    "contrasts": tables.contrasts_table,
    "requests": tables.requests_table,
    "training": tables.training_table,
    "forgetting": tables.forgetting_table,
    "plan": tables.plan_table,
    "data": tables.data_table,
    "ledger": tables.ledger_table,
    "derived": tables.derived_table,
    "origin": tables.origin_table,
    "exports": exports.exports_table,
}


def _inline(chart: Chart | None) -> dict[str, Any] | None:
    return {"title": chart.title, "svg": Markup(chart.svg)} if chart else None  # noqa: S704, drawn by drawing.py


def _level(run: RunRecord) -> str:
    levels = [found.level for arm in run.arms if (found := run.estimate(arm))]
    return words.level_text(levels[0]) if levels else "95%"
