"""Train, validation and test rows, chosen by what a row says and never by where it stands.

A row's place depends on its prompt and `data.seed` alone, so adding rows moves none of the old ones, and two machines
agree. Rows with one prompt stay together, case and punctuation apart; near-duplicates follow the first of them in the
file, and so do the turns of one conversation, so that the test set asks nothing that was trained. Where a few prompts
have many answers, the answers take the prompts' part.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from ..errors import DataError, RecipeError
from ..recipe import DataSpec
from ..types import Comparison, Message, Row
from .chance import in_order, uniform
from .layout import content_id
from .read import read
from .similar import folded, near_pairs
from .store import Places, some, stored_rows

Unit = Literal["prompt", "answer"]

# With fewer prompts than this expected in a split, chance would leave it empty or with a few prompts' quirks.
_FEWEST_PROMPTS = 5
_USUAL_FRACTION = 0.1
# A question that more conversations than this go through is how people begin to talk ("Hi"), and joins none of them.
_MOST_LATER_ROWS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Rows to train on, to choose with, and to judge by; each in an order that is a function of content and seed.

    `unit` says what no two splits may share: a prompt, or, where prompts are few, an answer's text.
    """

    train: Sequence[Row]
    valid: Sequence[Row]
    test: Sequence[Row]
    unit: Unit = "prompt"

    @property
    def note(self) -> str:
        """What the user should be told about the splitting; empty where it is the usual one."""
        if self.unit == "prompt":
            return ""
        return "few prompts, many answers: no answer stands in two splits, prompts do"


def split(rows: Iterable[Row], spec: DataSpec) -> Splits:
    """Split `rows` by the fractions of `spec`, or read the files that `spec.valid` and `spec.test` name.

    A fraction of 0 gives an empty split. Raises DataError when a fraction or a file yields no row, RecipeError when the
    fractions leave nothing to train on.
    """
    rows = stored_rows(rows)
    valid_fraction = 0.0 if isinstance(spec.valid, str) else spec.valid
    test_fraction = 0.0 if isinstance(spec.test, str) else spec.test
    if valid_fraction + test_fraction >= 1:
        what = f"valid = {valid_fraction} and test = {test_fraction} leave nothing to train on"
        raise RecipeError(what, where="data", fix="Let them add up to less than 1.")
    shares = array("q"), array("q"), array("q")
    unit, apart = unit_of(rows, spec), len(rows)
    if valid_fraction or test_fraction:
        leaders = clusters(rows, spec.near_duplicates, unit)
        apart = len(set(leaders))
        for place, leader in enumerate(leaders):
            draw = uniform(content_key(rows[leader], unit), spec.seed)
            # Test first: changing the size of the validation split leaves the test split as it is.
            shares[2 if draw < test_fraction else 1 if draw < test_fraction + valid_fraction else 0].append(place)
    else:
        shares[0].extend(range(len(rows)))
    train, valid, test = (some(rows, share) for share in shares)
    _check_size(valid, "valid", valid_fraction, len(rows), apart)
    _check_size(test, "test", test_fraction, len(rows), apart)
    _check_size(train, "train", 1.0, len(rows), apart)
    if isinstance(spec.valid, str):
        valid = stored_rows(read(spec.valid, spec))
    if isinstance(spec.test, str):
        test = stored_rows(read(spec.test, spec))
    train, valid, test = (in_order(each, spec.seed) for each in (train, valid, test))
    return Splits(train=train, valid=valid, test=test, unit=unit)


def unit_of(rows: Sequence[Row], spec: DataSpec) -> Unit:
    """What splits may not share: answers where few prompts have many, as in `conflicts: keep` and some comparisons."""
    if spec.conflicts == "keep":
        return "answer"
    if not rows or not all(isinstance(row, Comparison) for row in rows):
        return "prompt"
    fractions = [each for each in (spec.valid, spec.test) if not isinstance(each, str) and each > 0]
    known = Places()
    for row in rows:
        known[prompt_key(row)] = 0
    prompts = len(known)
    few = prompts < len(rows) and prompts * min(fractions, default=_USUAL_FRACTION) < _FEWEST_PROMPTS
    return "answer" if few else "prompt"


def clusters(rows: Sequence[Row], threshold: float, unit: Unit = "prompt") -> Sequence[int]:
    """For each row the position of its cluster's first row.

    Rows that share a prompt (`unit` answer: the text of an answer), near-duplicates and the rows of a conversation that
    was logged turn by turn share a cluster.
    """
    parent = array("q", range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(a: int, b: int) -> None:
        a, b = sorted((root(a), root(b)))
        parent[b] = a

    first_of = Places()
    for index, row in enumerate(rows):
        for key in shared_keys(row, unit):
            join(first_of.setdefault(key, index), index)
    for earlier, later in chain(_continued(rows), near_pairs(rows, threshold)):
        join(earlier, later)
    return array("q", map(root, range(len(rows))))


def observations(rows: Sequence[Comparison], unit: Unit) -> list[str]:
    """What each choice is an observation of: its prompt, or, where prompts are few, its two answers.

    Several pairs of a prompt, or several people's choices between two answers, say less than their number.
    """
    return [content_id(question_key(row), content_key(row, unit)) for row in rows]


def prompt_key(row: Row) -> str:
    """A hash of what is asked, spaces at the ends apart; of a row without a prompt, its id."""
    asked = [[message.role, message.content.strip()] for message in row.prompt]
    return content_id("prompt", asked) if any(text for _, text in asked) else row.id


def question_key(row: Row) -> str:
    """A hash of what is asked, case and punctuation apart; of a row without a prompt, its id."""
    return asked_key(row.prompt) or row.id


def earlier_question_keys(row: Row) -> Iterator[str]:
    """The `question_key` of each answer that a conversation trains before its last one."""
    if not isinstance(row, Comparison):
        answers = (place for place, message in enumerate(row.messages[:-1]) if message.role == "assistant")
        yield from filter(None, (asked_key(row.messages[:place]) for place in answers))


def shared_keys(row: Row, unit: Unit) -> tuple[str, ...]:
    """Hashes of what a row may share with no row of another split: its prompt, or each of its answers."""
    if unit == "prompt":
        return (question_key(row),)
    answers = (row.chosen, row.rejected) if isinstance(row, Comparison) else row.messages[-1:]
    said = [(answer.content.strip(), answer.tool_calls) for answer in answers]
    return tuple(content_id("answer", text, list(calls)) for text, calls in said if text or calls) or (row.id,)


def content_key(row: Row, unit: Unit) -> str:
    """A hash of all that `unit` names in a row, the same whichever answer was chosen: it decides the row's place."""
    keys = (prompt_key(row),) if unit == "prompt" else shared_keys(row, unit)
    return keys[0] if len(keys) == 1 else content_id(*sorted(keys))


def asked_key(turns: Sequence[Message]) -> str:
    """A hash of what turns say, case and punctuation apart; empty where they say nothing."""
    asked = [[message.role, folded(message.content)] for message in turns]
    return content_id("question", asked) if any(text for _, text in asked) else ""


def _continued(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Pairs of positions: a row, and another whose conversation went through what the first one asks."""
    asked, heard, by = Places(), array("q"), array("q")
    if not any(any(earlier_question_keys(row)) for row in rows):
        return
    for place, row in enumerate(rows):
        asked.setdefault(question_key(row), place)
    for place, row in enumerate(rows):
        for key in earlier_question_keys(row):
            if asked[key] >= 0:
                heard.append(asked[key])
                by.append(place)
    times = np.bincount(np.array(heard, np.int64), minlength=1)
    yield from ((at, place) for at, place in zip(heard, by, strict=True) if times[at] <= _MOST_LATER_ROWS)


def _check_size(rows: Sequence[Row], name: str, fraction: float, count: int, apart: int) -> None:
    if rows or not fraction:
        return
    fix = "Give more rows, or a larger fraction, or a file of its own."
    if name == "train":
        fix = "Give more rows, or smaller fractions for valid and test."
    share = "" if name == "train" else f" = {fraction}"
    told = f"{count} rows" if apart == count else f"{count} rows, {apart} of them unlike the others,"
    raise DataError(f"{name}{share} of {told} gives an empty {name} split", where=f"data.{name}", fix=fix)
