"""What a rater sees next: every pair once, some again with sides swapped, in an order that any restart repeats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tunesmith.serve.choices import Choice, Pair
from tunesmith.serve.turns import FARTHEST_REPEAT, RaterName, Sharing, Showing, left_side, showings, waiting

MakePair = Callable[..., Pair]


def judge(rater: str, showing: Showing, pick: str = "left") -> Choice:
    return Choice(
        id=f"{rater}{showing}",
        rater=rater,
        pair=showing.pair,
        repeat=showing.repeat,
        left=showing.left,
        pick=pick,
        seconds=1.0,  # type: ignore[arg-type]
    )


def work(rater: str, pairs: Mapping[str, Pair], choices: list[Choice], sharing: Sharing, most: int) -> list[Showing]:
    """Judge what comes until nothing does, or `most` times."""
    seen = []
    for _ in range(most):
        left = waiting(rater, showings(rater, pairs, choices, sharing), choices)
        if not left:
            break
        seen.append(left[0])
        choices.append(judge(rater, left[0]))
    return seen


@pytest.fixture
def pairs(pair: MakePair) -> dict[str, Pair]:
    made = [pair(number, gold="a" if number < 5 else "") for number in range(60)]
    return {one.id: one for one in made}


def test_every_pair_comes_once_and_a_share_comes_again_later_with_sides_swapped(pairs: dict[str, Pair]) -> None:
    seen = work("Anna", pairs, [], Sharing(repeats=0.2), most=1000)
    first = [one for one in seen if not one.repeat]
    again = [one for one in seen if one.repeat]
    assert sorted(one.pair for one in first) == sorted(pairs)
    assert len(again) == 12
    assert len({one.pair for one in again}) == 12
    for one in again:
        assert not pairs[one.pair].gold
        (before,) = [other for other in first if other.pair == one.pair]
        assert one.left != before.left
        assert seen.index(one) - seen.index(before) >= FARTHEST_REPEAT


@settings(max_examples=40)
@given(count=st.integers(0, 30), repeats=st.floats(0, 1), answered=st.integers(0, 30))
def test_work_of_any_size_ends_and_a_restart_changes_nothing(count: int, repeats: float, answered: int) -> None:
    from tunesmith.types import Message

    texts = [Message(role="assistant", content=text) for text in "ab"]
    made = [Pair(prompt=(Message(role="user", content=str(n)),), a=texts[0], b=texts[1]) for n in range(count)]
    pairs, choices = {one.id: one for one in made}, list[Choice]()
    sharing = Sharing(repeats=repeats)
    plan = showings("Anna", pairs, choices, sharing)
    work("Anna", pairs, choices, sharing, answered)
    assert showings("Anna", dict(reversed(pairs.items())), choices, sharing) == plan
    work("Anna", pairs, choices, sharing, 100)
    assert [(one.pair, one.repeat) for one in choices] == [(one.pair, one.repeat) for one in plan]
    assert sum(not one.repeat for one in plan) == count


def test_sides_are_a_coin_toss_that_stays_as_it_fell(pairs: dict[str, Pair]) -> None:
    sides = [left_side(rater, name, repeat=False) for rater, name in itertools.product(("Anna", "Bob"), pairs)]
    assert 40 < sides.count("a") < 80
    assert sides == [left_side(rater, name, repeat=False) for rater, name in itertools.product(("Anna", "Bob"), pairs)]
    assert sides[:60] != sides[60:]


def test_raters_see_one_order_so_that_they_overlap_however_far_they_get(pairs: dict[str, Pair]) -> None:
    orders = [[one.pair for one in showings(rater, pairs, [], Sharing(repeats=0))] for rater in ("Anna", "Bob")]
    assert orders[0] == orders[1]


def test_a_pair_that_enough_raters_judged_is_shown_to_nobody_else(pairs: dict[str, Pair]) -> None:
    choices: list[Choice] = []
    sharing = Sharing(repeats=0, per_pair=1)
    for _ in range(100):  # in turns, one choice each
        for rater in ("Anna", "Bob", "Carl"):
            work(rater, pairs, choices, sharing, 1)
    assert sorted(one.pair for one in choices) == sorted(pairs)
    assert {one.rater for one in choices} == {"Anna", "Bob", "Carl"}


def test_a_skip_leaves_the_pair_to_others_and_is_not_repeated(pairs: dict[str, Pair]) -> None:
    plan = showings("Anna", pairs, [], Sharing(repeats=1))
    again = next(one for one in plan if one.repeat)
    skipped = judge("Anna", next(one for one in plan if one.pair == again.pair), "skip")
    assert again not in showings("Anna", pairs, [skipped], Sharing(repeats=1))
    assert again.pair in {one.pair for one in showings("Bob", pairs, [skipped], Sharing(per_pair=1))}


@pytest.mark.parametrize(("given_name", "tidy"), [("  Anna   B ", "Anna B"), ("A\u030anna", "\u00c5nna"), ("李", "李")])
def test_a_raters_name_is_tidied(given_name: str, tidy: str) -> None:
    assert TypeAdapter(RaterName).validate_python(given_name) == tidy


@pytest.mark.parametrize("name", ["", "   ", "a\x00b", "a\u200bb", "x" * 61])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(RaterName).validate_python(name)
