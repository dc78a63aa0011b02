"""Choices become pairs of Examples, the chosen answer first; whatever happens to a row on the way is in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..data.chance import uniform
from ..data.curate import SPLITS, Census, census, curate, drop_overlong
from ..data.read import read
from ..data.render import render_last
from ..data.spelled import spelled
from ..data.split import Unit, observations, prompt_key, split
from ..errors import DataError, RecipeError
from ..methods.annotate import Group
from ..methods.reward import at_the_end
from ..model.load import Vocabulary
from ..recipe import PreferenceSpec, Recipe
from ..screen import Screen
from ..types import Comparison, Conversation, LedgerEntry, Message
from .prepare import show_census

FEW_PROMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Rows and their pairs of Examples, split by split, and the count of what was left out."""

    rows: dict[str, tuple[Comparison, ...]]
    groups: dict[str, list[Group]]
    census: Census
    ledger: Sequence[LedgerEntry]
    unit: Unit

    @property
    def counts(self) -> dict[str, Any]:
        """`data` and `census` of results.json."""
        total = self.census.total
        tokens = [len(example.tokens) for group in self.groups["train"] for example in group]
        spread = {f"p{share}": float(np.percentile(tokens, share)) for share in (5, 50, 95)}
        sizes = {name: len(self.groups[name]) for name in SPLITS} | {"split_by": self.unit}
        dropped = total.read - total.kept
        data = {**sizes, "dropped": dropped, "train_tokens": sum(tokens), "tokens_per_row": spread}
        return {"data": data, "census": asdict(total)}


def prepare_pairs(recipe: Recipe, vocabulary: Vocabulary, screen: Screen) -> Pairs:
    """Read, curate, split and render choices. Raises DataError that names file and line."""
    spec = recipe.data
    whole = split(read(spec.train, spec), spec)
    if whole.note:
        screen.line(whole.note)
    kept, entries = curate(whole, spec)
    ledger = list(entries)
    limit = min(spec.max_tokens or vocabulary.context_tokens, vocabulary.context_tokens)
    rows: dict[str, tuple[Comparison, ...]] = {}
    groups: dict[str, list[Group]] = {}
    for name in SPLITS:
        found = comparisons(getattr(kept, name))
        pairs = [pair(row, vocabulary) for row in found]
        lengths = [max(len(example.tokens) for example in group) for group in pairs]
        short, dropped = drop_overlong(found, lengths, limit, spec.overlong) if found else ((), [])
        ledger += dropped
        within = {row.source for row in short}
        rows[name] = tuple(row for row in found if row.source in within)
        ledger += spelled(rows[name], vocabulary.tokenizer)
        groups[name] = [group for row, group in zip(found, pairs, strict=True) if row.source in within]
    counted = census(whole, replace(kept, **rows), ledger)
    prepared = Pairs(rows=rows, groups=groups, census=counted, ledger=ledger, unit=whole.unit)
    _show(prepared, screen)
    return prepared


def comparisons(rows: Sequence[object]) -> tuple[Comparison, ...]:
    """Rows that hold choices. Raises RecipeError for single answers."""
    found = tuple(row for row in rows if isinstance(row, Comparison))
    if len(found) != len(rows):
        what = "these rows hold single answers, and this method learns from choices between two"
        fix = "Give prompt, chosen and rejected columns, or use method: sft."
        if any(isinstance(row, Conversation) and isinstance(row.extra.get("label"), bool) for row in rows):
            fix = (
                "A label of true or false, as KTO learns from, is no choice: put a liked and a disliked answer to one "
                "prompt into columns chosen and rejected, or use method: sft on the liked ones alone."
            )
        raise RecipeError(what, where="method", fix=fix)
    return found


def pair(row: Comparison, vocabulary: Vocabulary) -> Group:
    """The chosen and the rejected answer after their prompt, each with only itself trained."""
    return tuple(
        render_last(answered(row.prompt, answer, row), vocabulary.tokenizer, vocabulary.eos_ids)
        for answer in (row.chosen, row.rejected)
    )


def answered(prompt: tuple[Message, ...], answer: Message, row: Comparison) -> Conversation:
    """One side of a choice as a conversation."""
    return Conversation(messages=(*prompt, answer), id=row.id, source=row.source)


def scored_pairs(rows: Sequence[Comparison], groups: Sequence[Group], spec: PreferenceSpec) -> list[Group]:
    """The pairs as a reward model reads them: scored at their end, with the row's margin."""
    return [
        tuple(at_the_end(example, margin(row, spec)) for example in group)
        for row, group in zip(rows, groups, strict=True)
    ]


def margin(row: Comparison, spec: PreferenceSpec) -> float:
    """How much better the chosen answer is, as the recipe's column has it. Raises DataError naming the row."""
    if spec.margin is None:
        return 0.0
    try:
        return spec.margin_scale * float(str(row.extra[spec.margin]))
    except (KeyError, ValueError):
        fix = "Mend the row, or leave preference.margin out."
        raise DataError(f"no number in the column {spec.margin!r}", where=row.source, fix=fix) from None


def halves(rows: Sequence[Comparison], seed: int) -> tuple[list[int], list[int]]:
    """Places of two halves that share no prompt; where prompts are few, no pair."""
    few = len({prompt_key(row) for row in rows}) < FEW_PROMPTS
    # Of several people's choices between two answers all go where the first does.
    first: dict[str, str] = {}
    same = [first.setdefault(each, row.id) for each, row in zip(observations(rows, "answer"), rows, strict=True)]
    keys = [uniform(f"half:{pair if few else prompt_key(row)}", seed) for pair, row in zip(same, rows, strict=True)]
    order = np.argsort(np.array(keys), kind="stable")
    cut = len(order) // 2
    while 0 < cut < len(order) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    return sorted(order[:cut].tolist()), sorted(order[cut:].tolist())


def _show(prepared: Pairs, screen: Screen) -> None:
    show_census(prepared.census, prepared.ledger, "pairs read", prepared.rows["train"], screen)
    data = prepared.counts["data"]
    spread = data["tokens_per_row"]
    screen.line(f"{data['train_tokens']:,} training tokens; {spread['p5']:.0f} to {spread['p95']:.0f} tokens an answer")
