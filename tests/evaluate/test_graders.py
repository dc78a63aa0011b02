"""Graders score as OpenAI's API describes them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.evaluate.graders import filled, fuzzy_match, grade
from tunesmith.types import Item

ITEM = Item(prompt=(), reference="", id="1", extra={"answer": "Yes", "deep": {"n": 3}, "none": None})


def check(operation: str, reference: str = "{{ item.answer }}") -> Mapping[str, str]:
    return {"type": "string_check", "input": "{{sample.output_text}}", "reference": reference, "operation": operation}


@pytest.mark.parametrize(
    ("operation", "answer", "score"),
    [
        *[("eq", "Yes", 1), ("eq", "yes", 0), ("ne", "Yes", 0), ("ne", "no", 1)],
        *[("like", "Yes, indeed", 1), ("like", "yes", 0), ("ilike", "oh yes", 1), ("ilike", "no", 0)],
    ],
)
def test_a_string_is_checked(operation: str, answer: str, score: float) -> None:
    assert grade(check(operation))(answer, ITEM) == score


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "rouge_l"])
def test_similarity_is_1_for_the_same_text_and_0_for_another(metric: str) -> None:
    texts = {"input": "{{ sample.output_text }}", "reference": "one two three four"}
    score = grade({"type": "text_similarity", **texts, "evaluation_metric": metric})
    assert score("one two three four", ITEM) == pytest.approx(1)
    assert 0 < score("one two three", ITEM) < 1
    assert score("xyz", ITEM) < 0.1


def longest_common(one: str, other: str) -> int:
    """The table, cell by cell."""
    above = [0] * (len(other) + 1)
    for letter in one:
        row = [0]
        for place, match in enumerate(other):
            row.append(above[place] + 1 if letter == match else max(row[-1], above[place + 1]))
        above = row
    return above[-1]


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_fuzzy_match_counts_the_longest_common_subsequence(one: str, other: str) -> None:
    both = len(one) + len(other)
    assert fuzzy_match(one, other) == (2 * longest_common(one, other) / both if both else 1.0)


def test_fuzzy_match_of_long_texts_is_no_less_than_the_blocks_in_common() -> None:
    draw = random.Random(0)
    one, other = ("".join(draw.choices("abcdefgh ", k=3000)) for _ in range(2))
    assert fuzzy_match(one, other) >= SequenceMatcher(None, one, other, autojunk=False).ratio()


def test_places_are_filled_with_the_answer_and_the_rows_fields() -> None:
    text = "{{sample.output_text}}|{{ item.answer }}|{{item.deep.n}}|{{ item.none }}"
    assert filled(text, "{{ item.answer }}", ITEM.extra) == "{{ item.answer }}|Yes|3|null"
    for name in ("item.absent", "item.answer.x", "item.deep.m"):
        with pytest.raises(DataError, match="the row has no"):
            filled(f"{{{{ {name} }}}}", "", ITEM.extra)
    for name in ("item", "sample.output_json", "answer"):
        with pytest.raises(DataError):
            filled(f"{{{{ {name} }}}}", "", ITEM.extra)
