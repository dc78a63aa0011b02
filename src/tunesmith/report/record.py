"""Reads a run folder for the report. Whatever a run did not measure is absent here, never an error.

Only `results.json` must exist. What cannot be read is named with its file and line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import FolderError
from ..folder import RunFolder, read_json, read_jsonl
from ..types import Estimate

LOOKUP_ARMS = frozenset({"nearest_neighbour", "majority", "length"})
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerGroup:
    """All ledger entries of one action and reason, and the first of them as an example."""

    action: str
    reason: str
    rows: int
    source: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run folder says, as read; an absent file is an empty value."""

    folder: Path
    results: Json
    plan: Json
    recipe: Json
    steps: tuple[Json, ...]
    ledger: tuple[LedgerGroup, ...]
    answers: Mapping[str, tuple[Json, ...]]
    exports: tuple[Json, ...] = ()

    @property
    def method(self) -> str:
        """What was done: `sft`, `reward`, `dpo`, `ppo` or `grpo`."""
        return str(part(self.results, "method") or "sft")

    @property
    def arms(self) -> Mapping[str, Json]:
        """Arm name to what was measured of it, in the order of the run; reward models come before their baselines."""
        names = ("models", "baselines") if self.method == "reward" else ("arms",)
        found = {name: arm for kind in names for name, arm in (part(self.results, kind) or {}).items()}
        arms = {name: arm for name, arm in found.items() if isinstance(arm, dict)}
        if self.method != "reward":
            return arms
        return {name: {**arm, "metrics": {self.metric: arm.get(self.metric)}} for name, arm in arms.items()}

    @property
    def metric(self) -> str:
        """The metric that decides: as the task names it, else the first one measured."""
        if self.method == "reward":
            return "pair_accuracy"
        named = part(self.results, "task", "metric") or part(self.recipe, "task", "metric")
        measured = [metric for arm in self.arms.values() for metric in part(arm, "metrics") or {}]
        return str(named) if named else (measured[0] if measured else "")

    @property
    def tuned(self) -> tuple[str, ...]:
        """Arms that were trained, in the order of the run."""
        return tuple(name for name in self.arms if self.kind(name) == "tuned")

    @property
    def subject(self) -> str | None:
        """The tuned arm that headlines speak of: chosen by validation, else the first, never by test scores."""
        named = part(self.results, "subject")
        return named if named in self.tuned else (self.tuned[0] if self.tuned else None)

    @property
    def prompted(self) -> str | None:
        """The untrained arm to beat: the best prompt by validation, else the last prompted arm of the run."""
        named = part(self.results, "best_prompted")
        candidates = [name for name in self.arms if self.kind(name) == "prompted"]
        return named if named in self.arms else (candidates[-1] if candidates else None)

    def kind(self, arm: str) -> str:
        """`tuned`, `lookup` or `prompted`."""
        if part(self.arms, arm, "train"):
            return "tuned"
        return "lookup" if arm in LOOKUP_ARMS else "prompted"

    def estimate(self, arm: str, metric: str | None = None) -> Estimate | None:
        """An arm's metric with its interval; the deciding metric unless named."""
        return as_estimate(part(self.arms, arm, "metrics", metric or self.metric))

    def lines(self, key: str) -> list[Json]:
        """The rows of a list of the results (`curve`, `rollouts`, ...); empty where it is absent."""
        return [row for row in part(self.results, key) or [] if isinstance(row, dict)]

    def planned(self, arm: str) -> tuple[Json, Json]:
        """What training an arm was predicted to cost, and what it did cost: seconds, peak_memory_bytes, flops."""
        predicted = part(self.results, "plan", arm, "predicted") or part(self.plan, "arms", arm, "predicted")
        measured = part(self.results, "plan", arm, "measured") or part(self.arms, arm, "train")
        return predicted or {}, measured or {}

    def contrasts(self) -> list[Json]:
        """Paired differences on the deciding metric that have a usable estimate."""
        rows = [row for row in self.lines("contrasts") if row.get("metric") == self.metric]
        return [{**row, "estimate": found} for row in rows if (found := as_estimate(row.get("difference")))]

    def contrast(self, a: str | None, b: str | None) -> Json | None:
        """The difference `a - b` on the deciding metric, or None where it was not measured."""
        return next((row for row in self.contrasts() if row.get("a") == a and row.get("b") == b), None)


def read_record(folder: Path) -> RunRecord:
    """Read a run folder. Raises FolderError when it has no readable `results.json` or a damaged line."""
    files = RunFolder(path=Path(folder))
    if not files.results.is_file():
        fix = "Give a run folder whose run has finished; `tunesmith run` again resumes one that has not."
        raise FolderError("no results.json, so there is nothing to report", where=str(folder), fix=fix)
    return RunRecord(
        folder=files.path,
        results=_mapping(files.results),
        plan=_mapping(files.plan),
        recipe=_mapping(files.recipe),
        steps=tuple(_rows(files.metrics)),
        ledger=_group(_rows(files.ledger)),
        answers={path.stem: tuple(_rows(path)) for path in sorted((files.path / "answers").glob("*.jsonl"))},
        exports=tuple(_mapping(path) for path in sorted((files.path / "exports").glob("*.json"))),
    )


def part(tree: Any, *keys: str) -> Any:
    """The value under nested keys, or None where any of them is absent."""
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def as_estimate(value: Any) -> Estimate | None:
    """An Estimate from its JSON form; None when absent or not finite. Bounds that are absent equal the value."""
    middle = part(value, "value")
    if not is_number(middle):
        return None
    low, high = (float(bound if is_number(bound := part(value, side)) else middle) for side in ("low", "high"))
    n, level = (found if is_number(found := part(value, key)) else other for key, other in (("n", 0), ("level", 0.95)))
    return Estimate(value=float(middle), low=low, high=high, n=int(n), level=float(level))


def is_number(value: Any) -> bool:
    """True for a finite int or float; JSON written elsewhere may hold NaN or Infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(path: Path) -> Json:
    """A JSON or YAML file that holds a mapping; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FolderError(f"damaged: {error}", where=str(path), fix="Delete the file and run again.") from None
    if not isinstance(content, dict):
        raise FolderError("does not hold a mapping of keys", where=str(path), fix="Delete the file and run again.")
    return content


def _rows(path: Path) -> Iterator[Json]:
    """The objects of a JSON-lines file."""
    return (row for row in read_jsonl(path) if isinstance(row, dict))


def _group(entries: Iterator[Json]) -> tuple[LedgerGroup, ...]:
    """Ledger entries counted by action and reason, most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], Json] = {}
    for entry in entries:
        key = (str(entry.get("action", "")), str(entry.get("reason", "")))
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, entry)
    return tuple(
        LedgerGroup(
            action=action,
            reason=reason,
            rows=rows,
            source=str(first[action, reason].get("source", "")),
            detail=str(first[action, reason].get("detail", "")),
        )
        for (action, reason), rows in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
