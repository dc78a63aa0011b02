"""What a summary says, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tunesmith.evaluate.stats import wilson
from tunesmith.serve.choices import Choice, Pair
from tunesmith.serve.summary import Summary, summarise
from tunesmith.types import Estimate, Message

MakePair = Callable[..., Pair]


def say(pair: Pair, rater: str, verdict: str, *, left: str = "a", **changes: object) -> Choice:
    pick = {"a": "left" if left == "a" else "right", "b": "left" if left == "b" else "right"}.get(verdict, verdict)
    repeat = bool(changes.pop("repeat", False))
    fields = {
        "id": f"{rater}{pair.id}{repeat}",
        "rater": rater,
        "pair": pair.id,
        "repeat": repeat,
        "left": left,
        "pick": pick,
        "seconds": 2.0,
    }
    return Choice(**{**fields, **changes})  # type: ignore[arg-type]


def of(pairs: list[Pair], choices: list[Choice]) -> Summary:
    return summarise({pair.id: pair for pair in pairs}, choices)


def share(right: int, n: int) -> Estimate:
    low, high = wilson(right, n)
    return Estimate(value=right / n, low=low, high=high, n=n, level=0.95)


def test_counts_are_of_standing_choices_and_undone_ones_are_told_apart(pair: MakePair) -> None:
    pairs = [pair(number) for number in range(5)]
    verdicts = ["a", "b", "tie", "both_bad", "skip"]
    choices = [
        say(one, "Anna", verdict, seconds=float(n))
        for n, (one, verdict) in enumerate(zip(pairs, verdicts, strict=True))
    ]
    undone = say(pairs[0], "Anna", "b", id="undone", undone="2026-01-01", seconds=99.0)
    found = of(pairs, [*choices, undone]).everybody
    assert (found.choices, found.decided, found.ties, found.both_bad, found.skipped, found.undone) == (5, 2, 1, 1, 1, 1)
    assert found.median_seconds == 2.0


def test_position_bias_is_the_share_of_left_choices(pair: MakePair) -> None:
    pairs = [pair(number) for number in range(5)]
    choices = [say(one, "Anna", "a", left="a" if n < 4 else "b") for n, one in enumerate(pairs)]
    repeats = [say(pairs[0], "Anna", "a", left="b", repeat=True)]
    assert of(pairs, choices + repeats).everybody.left == share(4, 5)


def test_length_bias_counts_each_pair_of_unequal_lengths_once(pair: MakePair) -> None:
    short, long = Message(role="assistant", content="s"), Message(role="assistant", content="long")
    pairs = [
        pair(1, a=short, b=long),
        pair(2, a=long, b=short),
        pair(3, a=short, b=Message(role="assistant", content="t")),
    ]
    choices = [say(pairs[0], "Anna", "b"), say(pairs[1], "Anna", "b"), say(pairs[2], "Anna", "a")]
    assert of(pairs, choices).everybody.longer == share(1, 2)
    two_raters = of(pairs, [*choices, say(pairs[0], "Bob", "a")]).everybody.longer
    assert two_raters is not None
    assert (two_raters.value, two_raters.n) == (0.25, 2)


def test_a_repeat_is_alike_where_the_same_answer_was_preferred_on_the_other_side(pair: MakePair) -> None:
    pairs = [pair(number) for number in range(4)]
    first = [say(one, "Anna", verdict) for one, verdict in zip(pairs, ["a", "a", "tie", "skip"], strict=True)]
    again = [
        say(one, "Anna", verdict, left="b", repeat=True)
        for one, verdict in zip(pairs, ["a", "b", "tie", "a"], strict=True)
    ]
    found = of(pairs, first + again)
    assert found.everybody.repeats_alike == share(2, 3)
    assert found.judged == 3
    assert of(pairs, first).everybody.repeats_alike is None


def test_gold_pairs_check_attention_and_count_nowhere_else(pair: MakePair) -> None:
    pairs = [pair(1, gold="a"), pair(2, gold="b"), pair(3, model_a="M", model_b="N")]
    choices = [say(pairs[0], "Anna", "a"), say(pairs[1], "Anna", "tie"), say(pairs[2], "Anna", "b")]
    found = of(pairs, choices)
    assert found.everybody.gold_right == share(1, 2)
    assert (found.pairs, found.judged, found.everybody.left) == (1, 1, share(0, 1))


def test_agreement_is_over_pairs_that_two_raters_judged(pair: MakePair) -> None:
    pairs = [pair(number) for number in range(12)]
    anna = [say(one, "Anna", "ab"[n % 2]) for n, one in enumerate(pairs)]
    bob = [say(one, "Bob", "ab"[n % 2], left="b") for n, one in enumerate(pairs[:10])]
    found = of(pairs, anna + bob).agreement
    assert found is not None
    assert (found.value, found.n) == (1.0, 10)
    assert of(pairs, anna).agreement is None


def test_the_win_rate_counts_pairs_and_half_a_win_for_a_tie(pair: MakePair) -> None:
    turned = {"model_a": "N", "model_b": "M"}
    pairs = [pair(1, model_a="M", model_b="N"), pair(2, **turned), pair(3, model_a="M", model_b="N"), pair(4)]
    choices = [
        say(pairs[0], "Anna", "a"),
        say(pairs[0], "Bob", "b"),
        say(pairs[1], "Anna", "b"),
        say(pairs[2], "Anna", "tie"),
        say(pairs[3], "Anna", "a"),
    ]
    (duel,) = of(pairs, choices).duels
    assert (duel.a, duel.b, duel.wins, duel.losses, duel.ties) == ("M", "N", 2, 1, 1)
    assert duel.win_rate.value == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert duel.win_rate.n == 3


def test_a_win_rate_without_ties_has_a_score_interval(pair: MakePair) -> None:
    pairs = [pair(number, model_a="M", model_b="N") for number in range(20)]
    (duel,) = of(pairs, [say(one, "Anna", "a" if n < 15 else "b") for n, one in enumerate(pairs)]).duels
    assert duel.win_rate == share(15, 20)


def test_a_win_rate_of_ties_alone_is_not_known_to_be_one_half(pair: MakePair) -> None:
    pairs = [pair(number, model_a="M", model_b="N") for number in range(20)]
    (duel,) = of(pairs, [say(one, "Anna", "tie") for one in pairs]).duels
    assert duel.win_rate.low < 0.45
    assert duel.win_rate.high > 0.55


def test_one_rater_has_the_same_numbers_as_everybody(pair: MakePair) -> None:
    pairs = [pair(number) for number in range(6)]
    found = of(pairs, [say(one, "Anna", "a") for one in pairs])
    (rater,) = found.raters
    assert (rater.left, rater.longer, rater.choices) == (found.everybody.left, found.everybody.longer, 6)
