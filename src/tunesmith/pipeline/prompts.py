"""Prompts to learn and to be judged on, from rows of any layout; what else a row holds is its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..data.curate import SPLITS, Census, census, curate
from ..data.read import items, read
from ..data.render import prompt_tokens, refuse_unwritten, render_last
from ..data.spelled import spelled
from ..data.split import Unit, asked_key, split
from ..errors import DataError
from ..model.load import Vocabulary
from ..recipe import Recipe
from ..screen import Screen
from ..types import Comparison, Conversation, Example, Item, LedgerEntry, Row
from .pairs import answered
from .prepare import answer_room, show_census

ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Items of each split, training answers to imitate beside, and the count of what was left out."""

    items: dict[str, tuple[Item, ...]]
    examples: tuple[Example, ...]
    max_new_tokens: int
    longest_tokens: int
    census: Census
    ledger: Sequence[LedgerEntry]
    unit: Unit

    @property
    def asked(self) -> str:
        """What a policy is judged by, in words: new prompts, or, where these are few, the trained ones."""
        items = self.items["test"]
        if self.unit == "prompt":
            return f"{len(items)} held-out prompts"
        few = len({asked_key(item.prompt) for item in items})
        return f"{len(items)} answers to {few} prompts (which training asked too)"

    @property
    def counts(self) -> dict[str, Any]:
        """`data` and `census` of results.json."""
        total = self.census.total
        sizes = {name: len(self.items[name]) for name in SPLITS} | {"split_by": self.unit}
        return {"data": {**sizes, "dropped": total.read - total.kept}, "census": asdict(total)}


def prepare_prompts(recipe: Recipe, vocabulary: Vocabulary, screen: Screen) -> Prompts:
    """Read, curate and split. Raises DataError that names file and line."""
    spec = recipe.data
    whole = split(read(spec.train, spec), spec)
    if whole.note:
        screen.line(whole.note)
    kept, ledger = curate(whole, spec)
    rows: dict[str, Sequence[Row]] = {name: getattr(kept, name) for name in SPLITS}
    ledger.extend(spelled(chain.from_iterable(rows.values()), vocabulary.tokenizer))
    counted = census(whole, kept, ledger)
    show_census(counted, ledger, "read", rows["train"], screen)
    for row in chain.from_iterable(rows.values()):
        tools = row.tools if isinstance(row, Conversation) else ()
        refuse_unwritten(row.prompt, tools, vocabulary.tokenizer, row.source)
    found = asked_once({name: tuple(map(question, part)) for name, part in rows.items()}, whole.unit, recipe, screen)
    examples = tuple(example(row, vocabulary) for row in rows["train"] if _answer(row))
    longest = max((int((e.weights > 0).sum()) for e in examples), default=ANSWER_TOKENS)
    room = recipe.task.max_new_tokens or answer_room(longest)
    asked = {name: longest_prompt(found[name], rows[name], room, vocabulary) for name in SPLITS}
    screen.line(
        f"{len(found['train'])} prompts to learn on, {len(found['valid'])} to choose by, {len(found['test'])} to judge "
        f"by; answers up to {room} tokens"
    )
    return Prompts(
        items=found,
        examples=examples,
        max_new_tokens=room,
        longest_tokens=asked["train"] + room,
        census=counted,
        ledger=ledger,
        unit=whole.unit,
    )


def asked_once(
    items: Mapping[str, tuple[Item, ...]], unit: Unit, recipe: Recipe, screen: Screen
) -> dict[str, tuple[Item, ...]]:
    """The items to learn on, to choose and to judge by; of held-out ones as many as the recipe says, a prompt once.

    Where prompts are few and splits share them, every row asks its prompt again: other answers are drawn.
    """
    most = {"valid": recipe.evaluate.valid_rows, "test": recipe.evaluate.rows}
    found = dict(items)
    for name, limit in most.items():
        found[name] = each_once(items[name], unit, f"{name} rows", screen)[:limit]
    return found


def each_once(items: Sequence[Item], unit: Unit, rows: str, screen: Screen) -> tuple[Item, ...]:
    """The first item of each prompt, or of each row where prompts are few; what was left out is told."""
    once: dict[str, Item] = {}
    for item in items:
        once.setdefault(asked_key(item.prompt) if unit == "prompt" else item.id, item)
    if len(once) < len(items):
        screen.line(f"{len(items)} {rows} ask {len(once)} prompts; each is asked once")
    return tuple(once.values())


def longest_prompt(items: Sequence[Item], rows: Sequence[Row], room: int, vocabulary: Vocabulary) -> int:
    """Tokens of the longest prompt. Raises DataError naming its row where the context leaves no `room` to answer it."""
    lengths = [len(prompt_tokens(item.prompt, vocabulary.tokenizer, item.tools)) for item in items]
    longest = int(np.argmax(lengths))
    if lengths[longest] + room > vocabulary.context_tokens:
        fix = "Shorten it, or lower task.max_new_tokens."
        where = next(row.source for row in rows if row.id == items[longest].id)
        raise DataError(f"the prompt leaves no room for {room} tokens of answer", where=where, fix=fix)
    return lengths[longest]


def question(row: Row) -> Item:
    """What a row asks; its answer, the chosen one of two, is the reference."""
    if isinstance(row, Comparison):
        return Item(prompt=row.prompt, reference=row.chosen.content, id=row.id, extra=row.extra)
    if not row.prompt:
        raise DataError("plain text asks nothing", where=row.source, fix="Give rows with a prompt.")
    (item,) = items([row])
    return item


def example(row: Row, vocabulary: Vocabulary) -> Example:
    """A row's answer, to be imitated."""
    conversation = answered(row.prompt, row.chosen, row) if isinstance(row, Comparison) else row
    return render_last(conversation, vocabulary.tokenizer, vocabulary.eos_ids)


def _answer(row: Row) -> bool:
    return isinstance(row, Comparison) or (isinstance(row, Conversation) and bool(row.completion))
