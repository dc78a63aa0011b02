"""What the run's model was handed over as, and how it compared there with what was judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import words
from .record import RunRecord, as_estimate, is_number, part
from .tables import Cell, Table


def exports_table(run: RunRecord) -> Table:
    """A row for each export, and for each that fell short and was not kept."""
    rows = []
    for record in run.exports:
        reasons = "; ".join(map(str, record.get("reasons") or ()))
        named = f"{record.get('kind')} {record.get('type')}"
        cells = (named, verdict(record), _compared(record), str(record.get("path", "")))  # where it is or would be
        rows.append([Cell(text=text, note=reasons if place == 1 else "") for place, text in enumerate(cells)])
    return Table(columns=["export", "parity", "compared with what was judged", "where"], rows=rows, words=4)


def export_sentence(record: Mapping[str, Any]) -> str:
    """The same row for the terminal."""
    kept = record.get("passed") or not record.get("checked")
    where = f" Written to {record.get('path')}" if kept else ""
    return f"{record.get('kind')} {record.get('type')}: {verdict(record)}. {_compared(record)}{where}"


def verdict(record: Mapping[str, Any]) -> str:
    """`passed`, `fell short, not kept` or `NOT CHECKED`."""
    if not record.get("checked"):
        return "NOT CHECKED"
    return "passed" if record.get("passed") else "fell short, not kept"


def _compared(record: Mapping[str, Any]) -> str:
    rows, identical, ties = record.get("rows"), part(record, "answers", "identical"), part(record, "answers", "ties")
    if not is_number(identical):
        return "Nothing was compared." if not record.get("checked") else "The other program could not use it."
    told = f"In {record.get('program')}: {words.percent(identical)} of {rows} answers identical"
    told += f", {ties} more tied" if ties else ""
    told += f"; largest difference of a logit {part(record, 'logits', 'largest_difference'):.2g}"
    told += f", KL {part(record, 'logits', 'mean_kl_nats'):.2g} nats a token"
    found, metric = as_estimate(part(record, "score", "difference")), str(part(record, "score", "metric"))
    if found is None:
        return f"{told}."
    interval = words.interval_text(metric, found, difference=True)
    return f"{told}; {words.metric_label(metric)} {words.difference_text(metric, found.value)} ({interval})."
