"""Rows become training examples and held-out questions; whatever happens to a row on the way is in the ledger.

Rows, examples and ledger stay on disk (data/store.py) and are read one at a time, so a file may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.counts import counts
from ..data.curate import NEAR_DUPLICATE, SPLITS, Census
from ..data.read import items, unread
from ..data.similar import MANY_ROWS, MOST_COMPARED
from ..data.spelled import SPELLED
from ..data.store import View, join
from ..errors import DataError
from ..evaluate.lookup import MOST_ROWS
from ..evaluate.metrics import MODEL_METRICS, READING_METRICS, WHOLE_ANSWER_METRICS, find_metric
from ..folder import MANIFEST, sha256_file
from ..model.load import Vocabulary
from ..recipe import Recipe, TaskSpec
from ..screen import Screen
from ..types import Conversation, Example, Item, LedgerEntry, Row
from .rows import curated

ANSWER_ROOM = 1.25
OUTLIER = 4  # so many times as long as nearly all answers, one alone decides how long a base may ramble
PREAMBLE_TOKENS = 128  # for a wordy base to come to its answer, where the metric looks for that inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that the run reads: rows and their tokens, and the count of what was left out."""

    rows: Sequence[Conversation]
    train: Sequence[Example]
    valid: Sequence[Example]
    valid_items: Sequence[Item]
    test_items: Sequence[Item]
    max_new_tokens: int
    census: Census
    ledger: Sequence[LedgerEntry]

    @property
    def counts(self) -> dict[str, Any]:
        """`data` and `census` of results.json."""
        total = self.census.total
        sizes = {"train": len(self.rows), "valid": len(self.valid_items), "test": len(self.test_items)}
        tokens = counts(self.train).tokens
        spread = {f"p{share}": float(np.percentile(tokens, share)) for share in (5, 50, 95)}
        return {
            "data": {
                **sizes,
                "dropped": total.read - total.kept,
                "train_tokens": int(tokens.sum()),
                "tokens_per_row": spread,
            },
            "census": asdict(total),
        }


def prepare(recipe: Recipe, vocabulary: Vocabulary, screen: Screen) -> Prepared:
    """Read, curate, split and render. Raises DataError that names file and line."""
    spec, found = recipe.data, curated(recipe.data, vocabulary, screen)
    train, valid, test = (found.splits[name] for name in SPLITS)
    if found.note:
        screen.line(found.note)
    check_trained(train.examples, vocabulary)
    valid_rows = recipe.evaluate.valid_rows
    longest = max(train.longest_answer_tokens, valid.longest_answer_tokens)
    prepared = Prepared(
        rows=train.rows,
        train=train.examples,
        valid=valid.examples[: int(valid.parts[:valid_rows].sum())],
        valid_items=questions(valid.rows[:valid_rows], recipe.task),
        test_items=questions(test.rows[: recipe.evaluate.rows], recipe.task),
        max_new_tokens=recipe.task.max_new_tokens or max(answer_room(longest), _preamble(recipe, vocabulary)),
        census=found.census,
        ledger=found.ledger,
    )
    _show(prepared, screen)
    if longest > prepared.max_new_tokens:
        what = f"the longest answer has {longest} tokens, task.max_new_tokens = {prepared.max_new_tokens}"
        screen.warn(f"{what}: no arm can give it in full")
    usual = float(np.percentile(counts(train.examples).trained, 95))
    if not recipe.task.max_new_tokens and longest > OUTLIER * usual:
        what = f"the longest answer has {longest} tokens, 95% of the answers up to {usual:.0f}"
        screen.warn(f"{what}: every arm may write {prepared.max_new_tokens} tokens; task.max_new_tokens bounds it")
    if found.census.total.read > MANY_ROWS and spec.near_duplicates < 1:
        compared = f"a row is compared with the {MOST_COMPARED} look-alikes before it in each hash band"
        screen.line(f"over {MANY_ROWS:,} rows: {compared}, so some near-duplicates may stay")
    return prepared


def questions(rows: Sequence[Conversation], task: TaskSpec) -> Sequence[Item]:
    """Held-out rows as questions with their choices. Raises DataError naming a row that the metrics cannot grade."""
    metrics = {task.metric, *task.also}

    def question(place: int) -> Item:
        (item,) = items([rows[place]])
        return replace(item, choices=item.choices or tuple(task.choices or ()))

    found = View(question, range(len(rows)))
    for row, item in zip(rows, found, strict=True):
        if not item.prompt and metrics != {"completion_loss"}:
            wrong = min(metrics - {"completion_loss"})
            fix = "Set task.metric: completion_loss and leave task.also out, or give rows with a prompt."
            raise DataError(f"plain text asks nothing, so {wrong} has no answer to grade", where=row.source, fix=fix)
        if "completion_loss" in metrics and not row.completion and row.messages:
            fix = "Use metric call_match, which compares calls."
            raise DataError("completion_loss is of text, and the answer only calls tools", where=row.source, fix=fix)
        if "choice_accuracy" in metrics and item.reference not in item.choices:
            what = (
                f"the answer {item.reference[:60]!r} is none of task.choices"
                if item.choices
                else "there are no choices"
            )
            fix = "Set task.choices to the closed list of answers, spelled as in the data."
            raise DataError(f"{what}, which metric choice_accuracy needs", where=row.source, fix=fix)
        check_reference(row, item, task)
    return found


def check_reference(row: Conversation, item: Item, task: TaskSpec) -> None:
    """Raises DataError naming a row whose reference a metric could not read when all is answered."""
    for name in sorted({task.metric, *task.also} & READING_METRICS):
        try:
            find_metric(name, task, Path())([item], [""])
        except DataError as error:
            raise DataError(error.what, where=row.source, fix=error.fix) from None


def fingerprints(recipe: Recipe, root: Path) -> dict[str, str]:
    """SHA-256 of each local file that the recipe names, by key: a run goes on only with what it began with.

    Rows, the manifests of reward models, and the user's own metrics and reward relative to `root` (the recipe's
    folder): arms graded by two versions of a metric cannot be compared. What such a file imports is not looked at.
    """
    data, task = recipe.data, recipe.task
    named = {
        "data.train": data.train,
        "data.valid": data.valid,
        "data.test": data.test,
        "evaluate.retention": recipe.evaluate.retention,
    }
    files = {key: Path(name) for key, name in named.items() if isinstance(name, str)}
    own = {"task.metric": task.metric, **{f"task.also[{i}]": name for i, name in enumerate(task.also)}}
    own["reward.by"] = recipe.reward.by
    files |= {key: root / name.rpartition(":")[0] for key, name in own.items() if ".py:" in name}
    models = {"reward.by": recipe.reward.by, "reward.judge": recipe.reward.judge}
    made = [(key, name, which) for key, name in models.items() for which in ("reward", "judge")]
    files |= {f"{key} ({which})": Path(name) / which / MANIFEST for key, name, which in made if name}
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


def _preamble(recipe: Recipe, vocabulary: Vocabulary) -> int:
    """Tokens that every arm may write at least, so that a prompted base is not cut before it has answered."""
    metrics = {recipe.task.metric, *recipe.task.also}
    if metrics <= WHOLE_ANSWER_METRICS | MODEL_METRICS:
        return 0
    return min(PREAMBLE_TOKENS, vocabulary.context_tokens // 8)


def answer_room(longest_tokens: int) -> int:
    """The longest answer and a quarter more, as a multiple of 8; 8 where there is no answer."""
    return 8 * math.ceil(max(1, longest_tokens) * ANSWER_ROOM / 8)


def show_census(census: Census, ledger: Sequence[LedgerEntry], read: str, train: Sequence[Row], screen: Screen) -> None:
    """What became of the rows of each split, and what of them no turn is made of. `read` heads their number."""
    rows = []
    for name, count in census.splits.items():
        left_out = ", ".join(f"{n} {reason}" for reason, n in count.dropped.items()) or "none"
        flags = ", ".join(f"{n} {reason}" for reason, n in count.flagged.items()) or "none"
        rows.append([name, str(count.read), str(count.kept), left_out, flags])
    screen.table(["split", read, "kept", "left out", "flagged"], rows)
    if NEAR_DUPLICATE in census.total.dropped:
        screen.line("near duplicates: see ledger.jsonl; data.near_duplicates says how alike they are, 1 keeps them")
    if SPELLED in census.total.flagged:
        first = next(entry for entry in ledger if entry.reason == SPELLED)
        meant = "the model reads them as its own marks, in training and when asked; respell what is not meant so"
        screen.warn(f"rows spell special tokens, such as {first.source} ({first.detail}): {meant}")
    if columns := unread(train):
        screen.line(columns)


def _show(prepared: Prepared, screen: Screen) -> None:
    show_census(prepared.census, prepared.ledger, "read", prepared.rows, screen)
    counted = counts(prepared.train)
    tokens, trained = counted.tokens, int(counted.trained.sum())
    asks = any(item.prompt for item in join(prepared.valid_items, prepared.test_items))
    screen.line(
        f"{tokens.sum():,} training tokens, {trained:,} of them trained; {np.percentile(tokens, 5):.0f} to "
        f"{np.percentile(tokens, 95):.0f} tokens a row"
        + (f"; answers up to {prepared.max_new_tokens} tokens" if asks else "")
    )
    if len(prepared.rows) > MOST_ROWS:
        screen.line(f"the nearest-neighbour baseline copies from {MOST_ROWS:,} of the {len(prepared.rows):,} rows")
