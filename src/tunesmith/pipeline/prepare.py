"""Rows become training examples and held-out questions; whatever happens to a row on the way is in the ledger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data.curate import Census, census, curate, drop_overlong
from ..data.read import items, read
from ..data.render import render
from ..data.split import Splits, split
from ..errors import DataError, RecipeError
from ..model.load import Vocabulary
from ..recipe import DataSpec, Recipe
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
        sizes = {name: count.kept for name, count in self.census.splits.items()}
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
    kept = Splits(train=_conversations(kept.train), valid=_conversations(kept.valid), test=_conversations(kept.test))
    limit = min(spec.max_tokens or vocabulary.context_tokens, vocabulary.context_tokens)
    parts: dict[str, list[list[Example]]] = {}
    for name in ("train", "valid", "test"):
        rows, parts[name], entries = _rendered(getattr(kept, name), vocabulary, limit, spec)
        kept = Splits(**{n: rows if n == name else getattr(kept, n) for n in ("train", "valid", "test")})
        ledger += entries
    counted = census(whole, kept, ledger)
    train = tuple(example for examples in parts["train"] for example in examples)
    check_trained(train, vocabulary)
    wanted = recipe.evaluate.rows
    valid_rows = kept.valid[: recipe.evaluate.valid_rows]
    prepared = Prepared(
        rows=kept.train,  # type: ignore[arg-type]
        train=train,
        valid=tuple(example for examples in parts["valid"][: len(valid_rows)] for example in examples),
        valid_items=tuple(items(valid_rows)),  # type: ignore[arg-type]
        test_items=tuple(items(kept.test[:wanted])),  # type: ignore[arg-type]
        max_new_tokens=recipe.task.max_new_tokens or answer_room([row.completion for row in kept.train], vocabulary),
        census=counted,
        ledger=tuple(ledger),
    )
    _show(prepared, screen)
    return prepared


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
    examples = {row.id: render(row, vocabulary.tokenizer, vocabulary.eos_ids) for row in rows}
    lengths = [max(len(example.tokens) for example in examples[row.id]) for row in rows]
    if not rows:
        return (), [], []
    kept, entries = drop_overlong(rows, lengths, limit, spec.overlong)
    return kept, [examples[row.id] for row in kept], list(entries)


def _conversations(rows: Sequence[object]) -> tuple[Conversation, ...]:
    """Rows that supervised tuning can use. Raises RecipeError for preference pairs."""
    found = tuple(row for row in rows if isinstance(row, Conversation))
    if len(found) != len(rows):
        raise RecipeError(
            "these rows are preference pairs, and method sft imitates single answers",
            where="method",
            fix="Give prompt and completion columns.",
        )
    return found


def answer_room(answers: Sequence[str], vocabulary: Vocabulary) -> int:
    """Tokens of the longest answer and a quarter more, as a multiple of 8."""
    encoded = vocabulary.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    longest = max((len(ids) for ids in encoded), default=0) + 1  # type: ignore[arg-type]
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
    screen.line(
        f"{sum(tokens):,} training tokens, {trained:,} of them trained; {np.percentile(tokens, 5):.0f} to "
        f"{np.percentile(tokens, 95):.0f} tokens a row; answers up to {prepared.max_new_tokens} tokens"
    )
