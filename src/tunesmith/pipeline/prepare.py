"""Rows become training examples and held-out questions; whatever happens to a row on the way is in the ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.curate import SPLITS, Census, census, curate, drop_overlong
from ..data.read import items, read
from ..data.render import render
from ..data.split import Splits, split
from ..errors import DataError, RecipeError
from ..folder import sha256_file
from ..model.load import Vocabulary
from ..recipe import DataSpec, Recipe, TaskSpec
from ..screen import Screen
from ..types import Conversation, Example, Item, LedgerEntry

ANSWER_ROOM = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that the run reads: rows and their tokens, and the count of what was left out."""

    rows: tuple[Conversation, ...]
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    valid_items: tuple[Item, ...]
    test_items: tuple[Item, ...]
    max_new_tokens: int
    census: Census
    ledger: tuple[LedgerEntry, ...]

    @property
    def counts(self) -> dict[str, Any]:
        """`data` and `census` of results.json."""
        total = self.census.total
        sizes = {"train": len(self.rows), "valid": len(self.valid_items), "test": len(self.test_items)}
        tokens = [len(example.tokens) for example in self.train]
        spread = {f"p{share}": float(np.percentile(tokens, share)) for share in (5, 50, 95)}
        return {
            "data": {
                **sizes,
                "dropped": total.read - total.kept,
                "train_tokens": sum(tokens),
                "tokens_per_row": spread,
            },
            "census": asdict(total),
        }


def prepare(recipe: Recipe, vocabulary: Vocabulary, screen: Screen) -> Prepared:
    """Read, curate, split and render. Raises DataError that names file and line."""
    spec = recipe.data
    whole = split(read(spec.train, spec), spec)
    kept, ledger = curate(whole, spec)
    limit = min(spec.max_tokens or vocabulary.context_tokens, vocabulary.context_tokens)
    rows: dict[str, tuple[Conversation, ...]] = {}
    examples: dict[str, list[list[Example]]] = {}
    for name in SPLITS:
        found = conversations(getattr(kept, name))
        rows[name], examples[name], entries = _rendered(found, vocabulary, limit, spec)
        ledger += entries
    counted = census(whole, Splits(**rows), ledger)
    train = tuple(example for parts in examples["train"] for example in parts)
    check_trained(train, vocabulary)
    valid_rows = recipe.evaluate.valid_rows
    seen = zip(rows["train"] + rows["valid"], examples["train"] + examples["valid"], strict=True)
    answers = [parts[-1] for row, parts in seen if row.prompt]
    prepared = Prepared(
        rows=rows["train"],
        train=train,
        valid=tuple(example for parts in examples["valid"][:valid_rows] for example in parts),
        valid_items=questions(rows["valid"][:valid_rows], recipe.task),
        test_items=questions(rows["test"][: recipe.evaluate.rows], recipe.task),
        max_new_tokens=recipe.task.max_new_tokens or answer_room(answers),
        census=counted,
        ledger=tuple(ledger),
    )
    _show(prepared, screen)
    return prepared


def questions(rows: Sequence[Conversation], task: TaskSpec) -> tuple[Item, ...]:
    """Held-out rows as questions with their choices. Raises DataError naming a row that the metrics cannot grade."""
    metrics = {task.metric, *task.also}
    found = [replace(item, choices=item.choices or tuple(task.choices or ())) for item in items(rows)]
    for row, item in zip(rows, found, strict=True):
        if not item.prompt and metrics != {"completion_loss"}:
            wrong = min(metrics - {"completion_loss"})
            fix = "Set task.metric: completion_loss and leave task.also out, or give rows with a prompt."
            raise DataError(f"plain text asks nothing, so {wrong} has no answer to grade", where=row.source, fix=fix)
        if "choice_accuracy" in metrics and item.reference not in item.choices:
            what = (
                f"the answer {item.reference[:60]!r} is none of task.choices"
                if item.choices
                else "there are no choices"
            )
            fix = "Set task.choices to the closed list of answers, spelled as in the data."
            raise DataError(f"{what}, which metric choice_accuracy needs", where=row.source, fix=fix)
    return tuple(found)


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each local file of rows that the recipe names, by key: a run goes on only with what it began with."""
    data = recipe.data
    named = {
        "data.train": data.train,
        "data.valid": data.valid,
        "data.test": data.test,
        "evaluate.retention": recipe.evaluate.retention,
    }
    files = {key: Path(name) for key, name in named.items() if isinstance(name, str)}
    return {key: sha256_file(path) for key, path in files.items() if path.is_file()}


def check_trained(examples: Sequence[Example], vocabulary: Vocabulary) -> None:
    """Stop where training could teach nothing, or could not teach when to stop. Raises DataError with the reason."""
    if not any(example.weights.any() for example in examples):
        raise DataError(
            "no token is trained in any row",
            where="data.train",
            fix="Give rows whose last message is the assistant's and not empty.",
        )
    ends = np.array(vocabulary.eos_ids)
    if not any(np.isin(example.tokens[example.weights > 0], ends).any() for example in examples):
        raise DataError(
            "no end of turn is trained, so the model would never stop",
            where="data.train",
            fix="Check the base's chat template and eos token with `tunesmith check`.",
        )


def _rendered(
    rows: Sequence[Conversation], vocabulary: Vocabulary, limit: int, spec: DataSpec
) -> tuple[tuple[Any, ...], list[list[Example]], list[LedgerEntry]]:
    """Rows within the limit, their examples, and ledger entries of the others."""
    if not rows:
        return (), [], []
    examples = {row.id: render(row, vocabulary.tokenizer, vocabulary.eos_ids) for row in rows}
    lengths = [max(len(example.tokens) for example in examples[row.id]) for row in rows]
    kept, entries = drop_overlong(rows, lengths, limit, spec.overlong)
    return kept, [examples[row.id] for row in kept], list(entries)


def conversations(rows: Sequence[object]) -> tuple[Conversation, ...]:
    """Rows that supervised tuning can use. Raises RecipeError for preference pairs."""
    found = tuple(row for row in rows if isinstance(row, Conversation))
    if len(found) != len(rows):
        raise RecipeError(
            "these rows are preference pairs, and method sft imitates single answers",
            where="method",
            fix="Give prompt and completion columns.",
        )
    return found


def answer_room(answers: Sequence[Example]) -> int:
    """Tokens of the longest answer, end of turn included, and a quarter more, as a multiple of 8."""
    longest = max(
        (len(answer.tokens) - 1 - int(np.flatnonzero(answer.weights == 0)[-1]) for answer in answers), default=1
    )
    return 8 * math.ceil(longest * ANSWER_ROOM / 8)


def _show(prepared: Prepared, screen: Screen) -> None:
    rows = []
    for name, count in prepared.census.splits.items():
        left_out = ", ".join(f"{n} {reason}" for reason, n in count.dropped.items()) or "none"
        flags = ", ".join(f"{n} {reason}" for reason, n in count.flagged.items()) or "none"
        rows.append([name, str(count.read), str(count.kept), left_out, flags])
    screen.table(["split", "read", "kept", "left out", "flagged"], rows)
    tokens = [len(example.tokens) for example in prepared.train]
    trained = sum(int((example.weights > 0).sum()) for example in prepared.train)
    asks = any(item.prompt for item in (*prepared.valid_items, *prepared.test_items))
    screen.line(
        f"{sum(tokens):,} training tokens, {trained:,} of them trained; {np.percentile(tokens, 5):.0f} to "
        f"{np.percentile(tokens, 95):.0f} tokens a row"
        + (f"; answers up to {prepared.max_new_tokens} tokens" if asks else "")
    )
