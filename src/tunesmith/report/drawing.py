"""How every chart of the report is drawn: size, style, marks, and an SVG that takes its colours from the page.

Colours are CSS variables, so that one drawing suits light, dark and paper. The same run gives the same bytes: no date,
and ids from the chart's name. Hues are Okabe and Ito's (Color Universal Design, 2008).
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..types import Estimate

Number = int | float
INK, MUTED, LINE = "#121212", "#787878", "#d8d8d8"
PROMPTED, LOOKUP, TUNED, TUNED_TOO, PROXY = "#0072b2", "#7d7f85", "#d55e00", "#009e73", "#cc79a7"
_VARIABLES = {
    INK: "currentColor",
    MUTED: f"var(--muted, {MUTED})",
    LINE: f"var(--line, {LINE})",
    PROMPTED: f"var(--prompted, {PROMPTED})",
    LOOKUP: f"var(--lookup, {LOOKUP})",
    TUNED: f"var(--tuned, {TUNED})",
    TUNED_TOO: f"var(--tuned-too, {TUNED_TOO})",
    PROXY: f"var(--proxy, {PROXY})",
}
_WIDTH_INCHES = 5.2
_ROW_INCHES = 0.42


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing: its finding as a title, what it shows in words, and the inline SVG."""

    title: str
    alt: str
    svg: str


@contextmanager
def drawing(*, rows: Number) -> Iterator[Figure]:
    """A figure sized for that many rows, under a style that is put back afterwards."""
    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 10,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": INK,
        "xtick.labelsize": 10,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "legend.labelcolor": MUTED,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, 1.15 + _ROW_INCHES * rows), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def finish(figure: Figure, name: str, title: str, alt: str) -> Chart:
    """Draw, then leave of the file what belongs inside a page: no prolog, metadata, namespaces or shared ids."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"tunesmith-{name}"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    root, inside = svg.split(">", 1)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", root) + ">" + inside
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    label = html.escape(alt)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Chart(title=title, alt=alt, svg=re.sub(r"\n\s*", "\n", svg).strip())


def draw_interval(
    axes: Axes, y: Number, score: Estimate, scale: Number, *, color: str, marker: str, hollow: bool = False
) -> None:
    """A bar from low to high and a mark at the value, all times `scale`, at height `y`."""
    axes.plot([scale * score.low, scale * score.high], [y, y], color=color, linewidth=2.4, solid_capstyle="round")
    look: dict[str, Any] = {"markersize": 7, "markeredgewidth": 1.6, "markerfacecolor": "none" if hollow else color}
    axes.plot(scale * score.value, y, color=color, marker=marker, **look)


def draw_note(axes: Axes, x: Number, y: Number, text: str) -> None:
    """A number to the right of its mark."""
    axes.annotate(text, (x, y), xytext=(9, 0), textcoords="offset points", va="center", ha="left")


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a chart, bottom to top, and rule its columns."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def rule(axes: Axes) -> None:
    """Rule the rows of a chart whose height is a number."""
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.tick_params(axis="y", labelsize=10, labelcolor=MUTED)
    axes.set_axisbelow(True)


def legend_handle(label: str, color: str, marker: str) -> Line2D:
    """A legend entry for marks with a bar."""
    return Line2D([], [], color=color, marker=marker, markersize=6, linewidth=2, label=label)
