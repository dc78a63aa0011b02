"""The verdict follows its rule and says why."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.evaluate import stats
from tunesmith.evaluate.preferences import verdict_on_policy, verdict_on_reward
from tunesmith.evaluate.verdict import decide
from tunesmith.types import Contrast, Estimate, Measurement


def alike(metric: str) -> list[Measurement]:
    zeros, scores = np.zeros(40, dtype=np.int64), {metric: np.full(40, 0.25)}
    ids = tuple(map(str, range(40)))
    return [
        Measurement(
            arm=arm,
            ids=ids,
            answers=("",) * 40,
            scores=scores,
            prompt_tokens=zeros,
            completion_tokens=zeros,
            seconds=0.0,
        )
        for arm in "ab"
    ]


def gain(
    low: float, high: float, metric: str = "exact_match", n: int = 200, p_value: float = 0.001, over: str = "few_shot"
) -> Contrast:
    difference = Estimate(value=(low + high) / 2, low=low, high=high, n=n, level=0.95)
    return Contrast(a="lora", b=over, metric=metric, difference=difference, p_value=p_value)


def rise(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, n=100, level=0.95)


@pytest.mark.parametrize(
    ("contrast", "forgetting", "decision"),
    [
        (gain(0.1, 0.3), None, "ship"),
        (gain(0.1, 0.3), rise(0.0, 0.1), "ship"),
        (gain(0.1, 0.3), rise(0.1, 0.3), "ship"),
        (gain(0.1, 0.3), rise(0.21, 0.3), "do not ship"),
        (gain(-0.1, 0.3), rise(0.0, 0.1), "not shown"),
        (gain(0.0, 0.3), None, "not shown"),
        (gain(-0.1, 0.3), rise(0.21, 0.3), "do not ship"),
        (gain(-0.3, -0.1), None, "do not ship"),
        (gain(-0.3, -0.1, "completion_loss"), None, "ship"),
        (gain(0.1, 0.3, "completion_loss"), None, "do not ship"),
        (gain(0.5, 1.0, n=9), None, "not shown"),
        (gain(-1.0, -0.5, n=9), None, "not shown"),
    ],
)
def test_the_verdict_follows_its_rule(contrast: Contrast, forgetting: Estimate | None, decision: str) -> None:
    verdict = decide(contrast, forgetting, 0.2)
    assert verdict.decision == decision
    assert all(reason.endswith(".") for reason in verdict.reasons)


def test_the_reasons_tell_every_number() -> None:
    tuned, prompted = stats.estimate([1.0] * 163 + [0.0] * 37), stats.estimate([0.0] * 200)
    verdict = decide(gain(0.756, 0.874), rise(0.1, 0.34), 0.2, tuned=tuned, prompted=prompted)
    assert verdict.reasons == (
        "lora answers 81.5% of 200 held-out rows exactly; the best prompted base (few_shot) 0.0%; "
        "difference +81.5 points, 95% interval +75.6 to +87.4 (p = 0.001).",
        "The interval lies on the better side of 0, so the tuned model is better on rows like these.",
        "General loss changed by +0.220 nats per token, 95% interval +0.100 to +0.340: the interval straddles the "
        "limit of 0.2, so too much forgetting is not ruled out. The estimate itself is above it.",
    )


def test_the_reasons_of_a_loss_say_that_lower_is_better() -> None:
    tuned, prompted = rise(1.0, 1.2), rise(1.4, 1.6)
    reason = decide(gain(-0.5, -0.3, "completion_loss"), None, 0.2, tuned=tuned, prompted=prompted).reasons[0]
    assert reason == (
        "lora has a mean completion_loss of 1.1 on 100 held-out rows, lower is better; "
        "the best prompted base (few_shot) 1.5; difference -0.4, 95% interval -0.5 to -0.3 (p = 0.001)."
    )


def test_a_small_or_close_test_is_said_to_be_one() -> None:
    few = decide(gain(-0.2, 0.3, n=20, p_value=0.6), None, 0.2).reasons
    assert "With this spread, 20 held-out rows show a true difference of 37.7 points in 4 runs of 5." in few
    close = decide(gain(0.001, 0.1, p_value=0.0625), None, 0.2).reasons
    assert "It is close: the test of no difference gives p = 0.062. More rows would tell." in close
    tiny = decide(gain(0.1, 0.9, n=9), None, 0.2).reasons
    assert "9 held-out rows cannot carry a verdict: it takes at least 10." in tiny


def test_arms_that_never_differ_show_nothing() -> None:
    for metric in ("token_f1", "completion_loss"):
        verdict = decide(stats.contrast(*alike(metric), metric), None, 0.2)
        assert verdict.decision == "not shown"


@pytest.mark.parametrize(
    ("other", "decision", "told"),
    [
        (gain(0.1, 0.2, over="base"), "ship", "better side"),
        (gain(-0.1, 0.2, over="base"), "not shown", "Validation rows spoke against base"),
        (gain(-0.2, -0.1, over="base"), "do not ship", "base is shown to be better than lora"),
        (gain(-0.1, 0.2, over="majority"), "ship", "better side"),
        (gain(-0.3, -0.1, over="majority"), "do not ship", "majority is shown to be better than lora"),
        (gain(0.1, 0.2, "completion_loss", over="majority"), "do not ship", "majority is shown to be better"),
    ],
)
def test_every_other_arm_has_a_say(other: Contrast, decision: str, told: str) -> None:
    verdict = decide(gain(0.1, 0.3), None, 0.2, others=[other])
    assert verdict.decision == decision
    assert told in " ".join(verdict.reasons)


def test_an_opponent_whose_answers_were_cut_is_told() -> None:
    assert "cut 30% of few_shot's answers" in " ".join(decide(gain(0.1, 0.3), None, 0.2, cut=0.3).reasons)
    assert "cut" not in " ".join(decide(gain(0.1, 0.3), None, 0.2, cut=0.02).reasons)


def test_many_ties_and_answers_cut_on_either_side_are_told_with_a_win_rate() -> None:
    won, far = Estimate(value=0.6, low=0.55, high=0.65, n=200, level=0.95), rise(1.0, 2.0)
    told = verdict_on_policy(won, "judge", "200 prompts", far, None, 0.2, ties=0.75, cut={"base": 0.4, "lora": 0.0})
    assert told.decision == "ship"
    assert "75% of the prompts are ties" in " ".join(told.reasons)
    assert "cut 40% of base's and 0% of lora's answers" in " ".join(told.reasons)
    plain = verdict_on_policy(won, "judge", "200 prompts", far, None, 0.2, ties=0.1, cut={"base": 0.0, "lora": 0.02})
    assert len(plain.reasons) == 2


def test_a_handful_of_choices_or_prompts_carries_no_verdict() -> None:
    few = Estimate(value=1.0, low=0.51, high=1.0, n=4, level=0.95)
    assert verdict_on_reward(few, gain(0.2, 0.9, "pair_accuracy", n=4), 4).decision == "not shown"
    assert verdict_on_policy(few, "judge", "4 held-out prompts", rise(1.0, 2.0), None, 0.2).decision == "not shown"
