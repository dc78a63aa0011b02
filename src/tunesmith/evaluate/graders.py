"""Graders of reinforcement as OpenAI's API describes them: a number from an answer and the fields of its row.

Texts of a grader hold places, `{{ sample.output_text }}` for the answer and `{{ item.NAME }}` for a field of the row.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping

from ..errors import DataError
from ..types import Item
from .metrics import bleu, rouge_l

ANSWER = "sample.output_text"
GRADE = "tunesmith_grade"  # the function's name in a job's grader.py
_PLACE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")


def fuzzy_match(answer: str, reference: str) -> float:
    """Twice the longest common subsequence of characters over both lengths, 0..1: rapidfuzz's `ratio`."""
    both = len(answer) + len(reference)
    return 2 * _common(answer, reference) / both if both else 1.0


CHECKS: Mapping[str, Callable[[str, str], bool]] = {
    "eq": lambda given, wanted: given == wanted,
    "ne": lambda given, wanted: given != wanted,
    "like": lambda given, wanted: wanted in given,
    "ilike": lambda given, wanted: wanted.casefold() in given.casefold(),
}
SIMILARITIES: Mapping[str, Callable[[str, str], float]] = {"fuzzy_match": fuzzy_match, "bleu": bleu, "rouge_l": rouge_l}


def places(text: str) -> list[str]:
    """The names in a text's places, in their order."""
    return _PLACE.findall(text)


def filled(text: str, answer: str, fields: Mapping[str, object]) -> str:
    """The text with its places filled. Raises DataError where the row has no such field."""
    return _PLACE.sub(lambda found: answer if found[1] == ANSWER else _field(found[1], fields), text)


def grade(spec: Mapping[str, str]) -> Callable[[str, Item], float]:
    """The reward function of a `string_check` or `text_similarity` grader."""
    check = spec["type"] == "string_check"
    compare = CHECKS[spec["operation"]] if check else SIMILARITIES[spec["evaluation_metric"]]

    def score(answer: str, item: Item) -> float:
        given, wanted = (filled(spec[name], answer, item.extra) for name in ("input", "reference"))
        return float(compare(given, wanted))

    return score


def _field(name: str, fields: Mapping[str, object]) -> str:
    first, *further = name.split(".")
    value: object = fields
    for part in further:
        if not isinstance(value, Mapping) or part not in value:
            fix = f"The grader asks for {{{{ {name} }}}}; give every row this field."
            raise DataError(f"the row has no {'.'.join(further)!r}", fix=fix)
        value = value[part]
    if first != "item" or not further:
        raise DataError(f"{name!r} is neither item.NAME nor {ANSWER}", fix="Mend the grader.")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _common(one: str, other: str) -> int:
    """Length of the longest common subsequence, a whole row of the table as the bits of a number (Hyyrö 2004)."""
    where: dict[str, int] = defaultdict(int)
    for place, letter in enumerate(one):
        where[letter] |= 1 << place
    everywhere = (1 << len(one)) - 1
    row = everywhere
    for letter in other:
        both = row & where.get(letter, 0)
        row = ((row + both) | (row - both)) & everywhere
    return len(one) - row.bit_count()
