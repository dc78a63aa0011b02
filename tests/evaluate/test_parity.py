"""What counts as the same model, and what falls short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tunesmith.errors import ModelError
from tunesmith.evaluate.parity import Asked, Bounds, Difference, Reference, Reply, compare, logit_differences
from tunesmith.types import Contrast, Estimate, Item, Message

BOUNDS = Bounds(logits=1e-3, kl_nats=1e-6, alike=0.99)
LOGITS = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32)


def asked(place: int) -> Asked:
    item = Item(prompt=(Message(role="user", content=f"q{place}"),), reference="a", id=f"row{place}")
    return Asked(item=item, prompt=[1, place], before="a", tokens=[3, 2], text="a")


REFERENCE = Reference(rows=[asked(place) for place in range(10)], forced=3, logits=LOGITS)
SAME = Reply(
    program="p",
    prompts=[row.prompt for row in REFERENCE.rows],
    tokens=[row.tokens for row in REFERENCE.rows],
    texts=[row.text for row in REFERENCE.rows],
    logits=LOGITS,
)


def differing(*gaps: float) -> list[Difference]:
    return [Difference(id=f"row{place}", judged="a", exported="b", gap=gap) for place, gap in enumerate(gaps)]


def score(value: float, metric: str = "exact_match") -> Contrast:
    found = Estimate(value=value, low=value - 0.05, high=value + 0.05, n=10, level=0.95)
    return Contrast(a="exported", b="judged", metric=metric, difference=found, p_value=1.0)


def reasons(reply: Reply = SAME, *gaps: float, contrast: Contrast | None = None, bounds: Bounds = BOUNDS) -> list[str]:
    return compare(REFERENCE, reply, differing(*gaps), contrast, bounds)["reasons"]


def test_the_same_model_does_not_fall_short() -> None:
    found = compare(REFERENCE, SAME, [], score(0.0), BOUNDS)
    assert found["reasons"] == []
    assert found["logits"] == {"rows": 3, "positions": 6, "largest_difference": 0, "mean_kl_nats": 0, "same_best": 1}
    assert (found["answers"]["identical"], found["judged_again"]["identical"]) == (1, 1)


def test_a_tie_is_counted_and_forgiven_and_a_preference_is_not() -> None:
    found = compare(REFERENCE, SAME, differing(0.0019), None, BOUNDS)
    assert (found["answers"]["identical"], found["answers"]["ties"], found["reasons"]) == (0.9, 1, [])
    assert reasons(SAME, 0.0019, 0.0021) == ["90% of answers are identical or tied, fewer than 99%"]
    rounded = compare(REFERENCE, SAME, differing(0.0019, 3.0), None, Bounds(kl_nats=0.1))
    assert (rounded["answers"]["ties"], rounded["reasons"]) == (0, [])
    assert reasons(SAME, float("inf")) == ["90% of answers are identical or tied, fewer than 99%"]


def test_logits_that_moved_or_are_no_numbers_fall_short() -> None:
    moved, broken = LOGITS.copy(), LOGITS.copy()
    moved[2, 3] += 0.01
    broken[1, 1] = np.nan
    (said, *_) = reasons(replace(SAME, logits=moved))
    assert "a logit differs by 0.01, more than 0.001" in said
    assert len(reasons(replace(SAME, logits=broken))) == 2
    with pytest.raises(ModelError, match="logits of 12 tokens, the judged model of 11"):
        logit_differences(LOGITS, np.zeros((6, 12), np.float32))


def test_the_distance_is_that_of_the_distributions() -> None:
    other = np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)

    def softmax(rows: Any) -> Any:
        return np.exp(rows) / np.exp(rows).sum(1, keepdims=True)

    p, q = softmax(LOGITS.astype(float)), softmax(other.astype(float))
    found = logit_differences(LOGITS, other)
    assert found["mean_kl_nats"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert logit_differences(LOGITS, LOGITS + 5)["mean_kl_nats"] == pytest.approx(0, abs=1e-6)
    assert found["same_best"] == np.mean(p.argmax(1) == q.argmax(1))


def test_a_worse_score_falls_short_on_the_worse_side_only() -> None:
    assert reasons(contrast=score(0.1)) == reasons(contrast=score(-0.02)) == []
    assert "exact_match changes by -0.030 (-0.080 to +0.020)" in reasons(contrast=score(-0.03))[0]
    assert reasons(contrast=score(-0.1, "completion_loss")) == []
    assert len(reasons(contrast=score(0.1, "completion_loss"))) == 1


def test_other_tokens_and_another_base_are_told() -> None:
    (said,) = reasons(replace(SAME, prompts=[[9], *SAME.prompts[1:]]))
    assert said == "1 of 10 prompts become other tokens, the first that of row0"
    rows = [replace(row, before="z") for row in REFERENCE.rows]
    found = compare(replace(REFERENCE, rows=rows), SAME, [], None, BOUNDS)
    assert "the base or the adapter is not the one that was judged" in found["reasons"][0]
