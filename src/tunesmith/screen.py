"""What the user sees while a run works: stages, tables and progress; plain lines when the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .types import Derived

LINE_EVERY_SECONDS = 15.0


@runtime_checkable
class Tick(Protocol):
    """Say that `done` units are finished; `note` stands beside the bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """Move the bar."""
        ...


def terminal(*, stderr: bool = False, quiet: bool = False, soft_wrap: bool = False) -> Console:
    """Where words go. No emoji: in `metric.py:boom: ...` the name is a function's."""
    return Console(stderr=stderr, quiet=quiet, soft_wrap=soft_wrap, emoji=False)


class Screen:
    """A console, or nothing at all with `quiet`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or terminal(quiet=quiet, stderr=True, soft_wrap=True)

    def stage(self, title: str, detail: str = "") -> None:
        """Begin a part of the run."""
        aside = f"  [dim]{escape(detail)}[/]" if detail else ""
        self.console.print(f"[bold cyan]{escape(title)}[/]{aside}", highlight=False)

    def line(self, text: str) -> None:
        """One line of plain text."""
        self.console.print("  " + text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Something the user should know but need not act on now."""
        self.console.print(f"  [yellow]note[/] {escape(text)}", highlight=False)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table; where it is wider than the terminal its widest columns wrap, and nothing is cut off."""
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.console.print(table)

    def derived(self, values: Sequence[Derived]) -> None:
        """Values that were filled in, each with its reason."""
        shown = [one.value if isinstance(one.value, str) else f"{one.value:g}" for one in values]
        rows = [[one.key, value, one.reason] for one, value in zip(values, shown, strict=True)]
        self.table(["", "value", "why"], rows)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Tick]:
        """A bar with rate and remaining time; every quarter of a minute a line where there is no terminal."""
        if not self.console.is_terminal:
            yield _Lines(self, label, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=escape(note))


class _Lines:
    """Progress as lines, not too many."""

    def __init__(self, screen: Screen, label: str, total: int) -> None:
        self.screen, self.label, self.total = screen, label, total
        self.last = time.monotonic()
        self.first: tuple[int, float] | None = None  # what was done at the first word of it, and when that came

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self.first = self.first or (done, now)
        if done < self.total and now - self.last < LINE_EVERY_SECONDS:
            return
        self.last = now
        advanced, since = done - self.first[0], now - self.first[1]
        left = since / advanced * (self.total - done) if advanced > 0 else 0.0
        remaining = f", {left:.0f} s left" if done < self.total and left else ""
        self.screen.line(f"{self.label} {done}/{self.total}{remaining}{'  ' + note if note else ''}")
