"""Splitting: a function of what a row says; rows that ask the same stay together."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import similar
from tunesmith.data.layout import comparison_id, plain_row
from tunesmith.data.similar import _boilerplate, _sharing, folded, jaccard, near_pairs
from tunesmith.data.split import Splits, clusters, split
from tunesmith.data.tasks import legal_citations
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import DataSpec
from tunesmith.types import Comparison, Conversation, Message, Row

SPEC = DataSpec(train="rows.jsonl", valid=0.2, test=0.2)
TURN = ("user", "assistant")
WORDS = [f"w{number}" for number in range(200)]


def row(prompt: str, completion: str = "yes", line: int = 1) -> Conversation:
    return plain_row(prompt, completion, f"rows.jsonl:{line}")


def place(splits: Splits) -> dict[str, str]:
    return {found.id: name for name in ("train", "valid", "test") for found in getattr(splits, name)}


def distinct(count: int) -> list[Conversation]:
    return [row(f"question number {number}", line=number) for number in range(1, count + 1)]


def choice(prompt: str, better: str, worse: str, rater: str = "") -> Comparison:
    asked = (Message(role="user", content=prompt),)
    chosen, rejected = (Message(role="assistant", content=text) for text in (better, worse))
    identity = comparison_id(asked, chosen, rejected, rater)
    return Comparison(prompt=asked, chosen=chosen, rejected=rejected, rater=rater, id=identity, source="rows.jsonl:1")


@settings(max_examples=10)
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


@settings(max_examples=25)
@given(st.integers(), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3]))
def test_few_prompts_are_split_so_that_no_answer_stands_in_two_splits(number: int, seed: int, fraction: float) -> None:
    draw = random.Random(number)
    answers = [f"{number} {' '.join(draw.choices(WORDS, k=5))}" for number in range(1500)]
    rows: list[Row] = [choice(f"prompt {draw.randint(1, 3)}", *draw.sample(answers, 2)) for _ in range(400)]
    found = split(rows, DataSpec(train="x", valid=fraction, test=fraction, near_duplicates=1, seed=seed))
    parts = [found.train, found.valid, found.test]
    said = [{each.content for row in part for each in (row.chosen, row.rejected)} for part in parts]
    assert found.unit == "answer"
    assert "no answer stands in two splits" in found.note
    assert not said[0] & said[1] | said[0] & said[2] | said[1] & said[2]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)


def test_many_prompts_are_kept_together_whatever_their_answers() -> None:
    rows = [choice(f"prompt {number % 60}", f"good {number}", f"bad {number}") for number in range(240)]
    found = split(rows, DataSpec(train="x", valid=0.1, test=0.2))
    asked = [{row.prompt for row in part} for part in (found.train, found.valid, found.test)]
    assert found.unit == "prompt"
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]


def test_a_pair_judged_either_way_by_several_people_stays_together() -> None:
    pairs = [(f"one {number}", f"two {number}") for number in range(200)]
    rows = [choice("prompt", a, b, "ann") for a, b in pairs] + [choice("prompt", b, a, "bob") for a, b in pairs]
    places = place(split(rows, SPEC))
    assert all(places[one.id] == places[two.id] for one, two in zip(rows[:200], rows[200:], strict=True))


def test_one_prompt_with_many_answers_is_split_where_the_recipe_keeps_them() -> None:
    rows = [row("Write a sentence.", f"sentence {number}", number) for number in range(1, 200)]
    with pytest.raises(DataError, match="empty"):
        split(rows, SPEC)
    found = split(rows, SPEC.model_copy(update={"conflicts": "keep"}))
    assert (found.unit, len(found.train) + len(found.valid) + len(found.test)) == ("answer", 199)
    assert min(len(found.valid), len(found.test)) > 20


def test_near_duplicates_stay_together_and_follow_the_first() -> None:
    draw = random.Random(0)
    originals = [row(" ".join(draw.choices(WORDS, k=60)), line=number + 1) for number in range(100)]
    copies = [
        row(original.prompt[0].content + " indeed", line=number + 101) for number, original in enumerate(originals)
    ]
    alone, together = place(split(originals, SPEC)), place(split(originals + copies, SPEC))
    for original, copy in zip(originals, copies, strict=True):
        assert together[original.id] == together[copy.id] == alone[original.id]


def test_prompts_that_differ_in_case_and_punctuation_stay_together() -> None:
    rows = [row(text, text) for n in range(60) for text in (f"question number {n}", f"Question  NUMBER {n}!")]
    of_row = place(split(rows, SPEC))
    assert all(of_row[one.id] == of_row[other.id] for one, other in zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize("other", ["订单在哪里", "订单在哪里?", "订单在哪里？\u200b", "「订单」在哪里。"])
def test_punctuation_of_any_script_is_left_out(other: str) -> None:
    assert folded("订单在哪里？") == folded(other)
    assert folded("¿Dónde está?") == folded("Do\u0301nde esta\u0301")
    assert len({folded(text) for text in ("x²", "x2", "x > y", "x < y", "x", "-x")}) == 6


def test_a_conversation_logged_turn_by_turn_stays_in_one_split() -> None:
    def logged(number: int, turns: int) -> Conversation:
        said = [Message(role=role, content=f"{role} {number} {turn}") for turn in range(turns) for role in TURN]
        return Conversation(messages=tuple(said), id=f"{number}/{turns}", source=f"{number}/{turns}")

    kept = split([logged(number, turns) for number in range(60) for turns in (1, 2, 3)], SPEC)
    of_row = place(kept)
    assert len(kept.test) > 5
    assert all(len({of_row[f"{number}/{turns}"] for turns in (1, 2, 3)}) == 1 for number in range(60))


def test_conversations_that_begin_as_most_do_are_not_joined() -> None:
    def begun(number: int) -> Conversation:
        texts = ("Hi", "Hello, how can I help?", f"question {number}", f"answer {number}")
        turns = tuple(Message(role=role, content=text) for role, text in zip(TURN * 2, texts, strict=True))
        return Conversation(messages=turns, id=str(number), source=str(number))

    rows = [row("Hi", "Hello, how can I help?"), *map(begun, range(60))]
    assert len(set(clusters(rows, 1.0))) == 61


def test_clusters_are_transitive_and_led_by_their_first_row() -> None:
    words = WORDS[:60]
    chain = [row(" ".join([*words[:index], *words])) for index in (0, 1, 2)]
    assert list(clusters([row("something else"), *chain, row("something else", "no")], 0.9)) == [0, 1, 1, 1, 0]


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


@settings(max_examples=60)
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


def test_comparisons_are_alike_when_both_answers_are_whoever_judged() -> None:
    draw = random.Random(4)
    a, b, c = (" ".join(draw.choices(WORDS, k=40)) for _ in range(3))
    short = [choice("Write.", a, "yes"), choice("Write.", a, "no")]
    turned = [choice("Write.", a, b), choice("Write.", b, a), choice("Write.", a, c)]
    raters = [choice("Write.", a, b, "ann"), choice("Write.", f"{a}!", b, "bob"), choice("Write.", a, b + "?", "bob")]
    assert list(near_pairs(short, 0.9)) == list(near_pairs(turned, 0.9)) == []
    assert set(near_pairs(raters, 0.9)) == {(0, 1), (1, 2)}


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
    assert list(clusters(rows, 0.9)) == list(range(2500))


def test_a_threshold_of_one_turns_near_duplicates_off_and_a_low_one_is_refused() -> None:
    assert list(near_pairs([row("a b c"), row("A b c")], 1.0)) == []
    with pytest.raises(RecipeError, match="unrelated"):
        list(near_pairs([row("a"), row("b")], 0.2))


def test_two_empty_sets_are_alike() -> None:
    empty = np.array([], dtype=np.uint64)
    assert jaccard(empty, empty) == 1.0


@settings(max_examples=60)
@given(st.integers(1, 3), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 12), st.randoms())
def test_columns_that_share_a_band_are_those_that_plain_loops_find(
    bands: int, row: list[int], most: int, draw: random.Random
) -> None:
    keys = np.array([draw.sample(row, len(row)) for _ in range(bands)], dtype=np.uint32)
    wanted = set()
    for band in keys.tolist():
        for later, key in enumerate(band):
            twins = [earlier for earlier in range(later) if band[earlier] == key]
            wanted |= {(earlier, later) for earlier in twins[-most:]}
    found = list(_sharing(keys, most))
    assert len(found) == len(set(found))
    if most >= len(row):
        assert set(found) == wanted
    assert set(found) <= wanted


def test_among_many_rows_a_copy_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "MANY_ROWS", 10)
    draw = random.Random(1)
    rows = [row(" ".join(draw.choices(WORDS, k=50))) for _ in range(100)]
    copies = [row(f"{each.prompt[0].content} twice over") for each in rows]
    assert set(near_pairs(rows + copies, 0.9)) == {(index, index + 100) for index in range(100)}


def test_boilerplate_is_what_counting_every_shingle_finds() -> None:
    draw = np.random.default_rng(0)
    shared = draw.integers(0, 2**64, 40, np.uint64)
    rows = [[np.unique(shared[draw.random(40) < share]) for share in (0.1, 0.3, 0.0)] for _ in range(200)]
    for side, found in enumerate(_boilerplate(rows)):
        counts = Counter(value for each in rows for value in each[side].tolist())
        assert sorted(found.tolist()) == sorted(value for value, count in counts.items() if count > 40)
