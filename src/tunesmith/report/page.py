"""`report.html`: one page that says whether a run worked, what it cost, and how to check it. No script, no request.

Everything a user or a model wrote is escaped by the templates; only the charts' SVG, drawn here, goes in as it is, and
a content security policy forbids scripts besides. The terminal gets the same verdict in a few lines.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..folder import RunFolder, write_text
from . import findings
from .content import Page, content
from .policy_page import policy_page
from .record import RunRecord, read_record
from .reward_page import reward_page
from .sft_page import sft_page

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
    page = _page(run)
    return environment.get_template(page.template).render(content(run, page))


def print_report(folder: Path, console: Console) -> None:
    """Print verdict, finding, scores and costs of a run folder. Raises FolderError for an unreadable folder."""
    run = read_record(folder)
    page, decision = _page(run), findings.decision(run)
    text = Text(page.finding)
    for reason in page.reasons:
        text.append(f"\n• {reason}", style="dim")
    style = _STYLES.get(decision, "yellow")
    title = Text(decision.upper(), style=f"bold {style}")
    console.print(Panel(text, title=title, title_align="left", border_style=style))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(page.brief.columns):
        table.add_column(Text(column), justify="right" if number else "left")
    for arm, cells in zip(run.arms, page.brief.rows, strict=True):
        table.add_row(*(Text(cell.text) for cell in cells), style="bold" if arm in run.tuned else "")
    console.print(table)
    for tile in page.tiles[2:]:
        console.print(Text(f"{tile.label}: {tile.value} ({tile.note})"))
    if (report := RunFolder(path=run.folder).report).is_file():
        console.print(Text(f"report: {report}"))


def _page(run: RunRecord) -> Page:
    if run.method == "reward":
        return reward_page(run)
    return policy_page(run) if run.method in ("dpo", "ppo", "grpo") else sft_page(run)
