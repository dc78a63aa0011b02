"""Splitting: a function of what a row says; rows that ask the same stay together."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.layout import plain_row
from tunesmith.data.similar import jaccard, near_pairs
from tunesmith.data.split import Splits, clusters, split
from tunesmith.data.tasks import legal_citations
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import DataSpec
from tunesmith.types import Conversation

SPEC = DataSpec(train="rows.jsonl", valid=0.2, test=0.2)
WORDS = [f"w{number}" for number in range(200)]


def row(prompt: str, completion: str = "yes", line: int = 1) -> Conversation:
    return plain_row(prompt, completion, f"rows.jsonl:{line}")


def place(splits: Splits) -> dict[str, str]:
    return {found.id: name for name in ("train", "valid", "test") for found in getattr(splits, name)}


def distinct(count: int) -> list[Conversation]:
    return [row(f"question number {number}", line=number) for number in range(1, count + 1)]


@settings(max_examples=10, deadline=None)
@given(st.integers(60, 120), st.integers(0, 5), st.randoms())
def test_a_row_keeps_its_place_when_rows_are_added_or_shuffled(count: int, seed: int, draw: random.Random) -> None:
    spec = SPEC.model_copy(update={"seed": seed})
    rows = distinct(count)
    before = place(split(rows, spec))
    more = rows + [row(f"another {number}") for number in range(50)]
    draw.shuffle(more)
    after = place(split(more, spec))
    assert {key: after[key] for key in before} == before


def test_order_within_a_split_is_a_pure_function_of_content_and_seed() -> None:
    rows = distinct(100)
    first = split(rows, SPEC)
    assert split(rows[::-1], SPEC) == first
    assert split(rows, SPEC.model_copy(update={"seed": 1})) != first


def test_shares_are_close_to_the_fractions() -> None:
    found = split(distinct(2000), SPEC)
    assert [len(found.train), len(found.valid), len(found.test)] == pytest.approx([1200, 400, 400], abs=60)


def test_the_size_of_valid_does_not_move_test_rows() -> None:
    rows = distinct(300)
    assert split(rows, SPEC).test == split(rows, SPEC.model_copy(update={"valid": 0.05})).test


def test_rows_with_one_prompt_stay_together() -> None:
    rows = [row(f"question {number % 40}", f"answer {number}", number + 1) for number in range(400)]
    found = split(rows, SPEC)
    asked = [{each.prompt for each in rows} for rows in (found.train, found.valid, found.test)]
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]


def test_near_duplicates_stay_together_and_follow_the_first() -> None:
    draw = random.Random(0)
    originals = [row(" ".join(draw.choices(WORDS, k=60)), line=number + 1) for number in range(100)]
    copies = [
        row(original.prompt[0].content + " indeed", line=number + 101) for number, original in enumerate(originals)
    ]
    alone, together = place(split(originals, SPEC)), place(split(originals + copies, SPEC))
    for original, copy in zip(originals, copies, strict=True):
        assert together[original.id] == together[copy.id] == alone[original.id]


def test_clusters_are_transitive_and_led_by_their_first_row() -> None:
    words = WORDS[:60]
    chain = [row(" ".join([*words[:index], *words])) for index in (0, 1, 2)]
    assert clusters([row("something else"), *chain, row("something else", "no")], 0.9) == [0, 1, 1, 1, 0]


def test_files_are_read_in_place_of_fractions(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"prompt": "held", "completion": "out"}) + "\n")
    found = split(distinct(50), SPEC.model_copy(update={"test": str(path)}))
    assert [each.source for each in found.test] == [f"{path}:1"]
    assert len(found.train) + len(found.valid) == 50


def test_too_few_rows_for_a_split_say_what_to_do() -> None:
    with pytest.raises(DataError, match="empty") as caught:
        split(distinct(1), SPEC)
    assert "more rows" in caught.value.fix
    assert split(distinct(50), SPEC.model_copy(update={"valid": 0.0})).valid == ()
    with pytest.raises(RecipeError, match="nothing to train on"):
        split(distinct(50), SPEC.model_copy(update={"valid": 0.5, "test": 0.5}))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=8),
    st.sampled_from([0.5, 0.7, 0.9]),
)
def test_near_pairs_agree_with_comparing_every_pair(texts: list[list[str]], threshold: float) -> None:
    rows = [row(" ".join(text)) for text in texts]
    found = set(near_pairs(rows, threshold))
    sets = [{tuple(text[at : at + 3]) for at in range(max(1, len(text) - 2))} for text in texts]
    for later in range(len(texts)):
        if sets[later] in sets[:later]:
            assert (sets.index(sets[later]), later) in found  # equal rows are paired with the first of them only
            continue
        for earlier in range(later):
            similarity = len(sets[earlier] & sets[later]) / len(sets[earlier] | sets[later])
            is_first = sets.index(sets[earlier]) == earlier
            assert ((earlier, later) in found) == (similarity >= threshold and is_first)


def test_most_near_duplicates_among_many_rows_are_found_and_nothing_else() -> None:
    draw = random.Random(1)
    rows = [row(" ".join(draw.choices(WORDS, k=50))) for _ in range(300)]
    copies = [row(f"{each.prompt[0].content} twice over") for each in rows]
    assert set(near_pairs(rows + copies, 0.9)) == {(index, index + 300) for index in range(300)}


def test_one_canned_answer_to_different_questions_makes_no_duplicates() -> None:
    draw = random.Random(2)
    reply = " ".join(draw.choices(WORDS, k=120))
    rows = [row(" ".join(draw.choices(WORDS, k=8)), reply) for _ in range(100)]
    assert list(near_pairs(rows, 0.9)) == []


def test_a_fixed_instruction_before_every_prompt_makes_no_duplicates() -> None:
    draw = random.Random(3)
    instruction = " ".join(draw.choices(WORDS, k=150))
    rows = [row(f"{instruction} {' '.join(draw.choices(WORDS, k=6))}", draw.choice(["yes", "no"])) for _ in range(100)]
    assert list(near_pairs(rows, 0.9)) == []


def test_punctuation_and_case_do_not_make_rows_different() -> None:
    assert list(near_pairs([row("Cancel my order!"), row("cancel my  order")], 0.9)) == [(0, 1)]
    assert list(near_pairs([row("Is 3 < 5"), row("Is 3 > 5")], 0.9)) == []


def test_generated_citations_are_neither_dropped_nor_clustered() -> None:
    rows = list(legal_citations(2500, 0))
    assert clusters(rows, 0.9) == list(range(2500))


def test_a_threshold_of_one_turns_near_duplicates_off_and_a_low_one_is_refused() -> None:
    assert list(near_pairs([row("a b c"), row("A b c")], 1.0)) == []
    with pytest.raises(RecipeError, match="unrelated"):
        list(near_pairs([row("a"), row("b")], 0.2))


def test_two_empty_sets_are_alike() -> None:
    import numpy as np

    empty = np.array([], dtype=np.uint64)
    assert jaccard(empty, empty) == 1.0
