"""The lookup baselines copy what a person would find by searching, and always the same."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.evaluate import lookup
from tunesmith.evaluate.lookup import BUCKETS, _hash_grams, majority, nearest_neighbour
from tunesmith.types import Conversation, Item, Message


def row(prompt: str, completion: str) -> Conversation:
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    return Conversation(messages=turns, id=prompt, source="train.jsonl:1")


def item(prompt: str) -> Item:
    return Item(prompt=(Message(role="user", content=prompt),), reference="", id=prompt)


def plain_cosines(train: list[str], query: str) -> list[float]:
    """The same similarity by plain loops, n-grams kept as text."""

    def grams(text: str) -> Counter[str]:
        text = f" {' '.join(text.casefold().split())} "
        return Counter(text[start : start + n] for n in (3, 4, 5) for start in range(len(text) - n + 1))

    counts = [grams(text) for text in train]
    rows_with = Counter(gram for count in counts for gram in count)

    def weigh(count: Counter[str]) -> dict[str, float]:
        return {gram: k * (math.log((1 + len(train)) / (1 + rows_with[gram])) + 1) for gram, k in count.items()}

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        lengths = math.hypot(*one.values()) * math.hypot(*other.values())
        return sum(weight * other.get(gram, 0.0) for gram, weight in one.items()) / lengths if lengths else 0.0

    return [cosine(weigh(grams(query)), weigh(count)) for count in counts]


WORDS = st.lists(st.sampled_from(["cancel", "order", "refund", "my", "card", "arrived", "où", "北京"]), max_size=6)


@settings(max_examples=40)
@given(train=st.lists(WORDS.map(" ".join), min_size=1, max_size=8), query=WORDS.map(" ".join))
def test_the_nearest_prompt_is_the_one_that_plain_loops_find(train: list[str], query: str) -> None:
    cosines = plain_cosines(train, query)
    found = nearest_neighbour([row(prompt, str(place)) for place, prompt in enumerate(train)], [item(query)])
    assert cosines[int(found[0])] == pytest.approx(max(cosines), abs=2e-6)


def test_a_training_prompt_finds_itself_whatever_its_case_and_spacing() -> None:
    train = [row(f"question number {n} about {n * n}", f"answer {n}") for n in range(300)]
    items = [item(f"Question  NUMBER {n} about {n * n}") for n in range(300)]
    assert nearest_neighbour(train, items) == [f"answer {n}" for n in range(300)]


def test_n_grams_rarely_share_a_bucket() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    grams = ["".join(gram) for gram in itertools.product(letters, repeat=3)]
    starts = np.arange(len(grams)) * 3
    points = np.array([ord(letter) for gram in grams for letter in gram], dtype=np.uint32)
    buckets = len(set(_hash_grams(points, starts, 3).tolist()))
    expected = BUCKETS * (1 - (1 - 1 / BUCKETS) ** len(grams))
    assert buckets > 0.99 * expected


def test_ties_go_to_the_earliest_row() -> None:
    train = [row("zebra crossing", "z"), row("same words", "first"), row("same words", "second")]
    assert nearest_neighbour(train, [item("same words"), item("qqq"), item("")]) == ["first", "z", "z"]


def test_of_long_prompts_the_end_is_compared() -> None:
    filler = " ".join(str(number) for number in range(1500))
    train = [row(f"dogs {filler} cats", "ends in cats"), row(f"cats {filler} dogs", "ends in dogs")]
    assert nearest_neighbour(train, [item(f"mice {filler} dogs")]) == ["ends in dogs"]


def test_majority_repeats_the_commonest_completion_and_the_first_of_ties() -> None:
    train = [row("a", "x"), row("b", "y"), row("c", "y"), row("d", "x")]
    assert majority(train, [item("q"), item("r")]) == ["x", "x"]


def test_of_an_answer_that_only_calls_tools_its_calls_are_copied() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = (Message(role="user", content="a"), Message(role="assistant", content="", tool_calls=(call,)))
    train = [Conversation(messages=turns, id="a", source="train.jsonl:1")]
    for baseline in (nearest_neighbour, majority):
        (answer,) = baseline(train, [item("a")])
        assert json.loads(answer) == [call]


def test_no_items_need_no_answers() -> None:
    assert nearest_neighbour([row("a", "x")], []) == majority([row("a", "x")], []) == []


def test_lookup_without_training_rows_is_an_error() -> None:
    for baseline in (nearest_neighbour, majority):
        with pytest.raises(DataError, match="no training rows"):
            baseline([], [item("a")])


def test_of_very_many_rows_a_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MOST_ROWS", 20)
    train = [row(f"question {n} about {n * n}", str(n)) for n in range(100)]
    found = [int(answer) for answer in nearest_neighbour(train, [item(each.prompt[0].content) for each in train])]
    assert len(set(found)) == 20
    assert sum(place == answer for place, answer in enumerate(found)) == 20
