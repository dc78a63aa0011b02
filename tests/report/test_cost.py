"""Costs are checked against numbers worked out by hand, the bootstrap against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.report.cost import break_even_requests, gain_ratio, lora_versus_full, savings

ARMS = {
    "few_shot": {"prompt_tokens_per_request": 200.0},
    "lora": {"prompt_tokens_per_request": 50.0, "train": {"flops": 3e12, "seconds": 30.0, "peak_memory_bytes": 1e9}},
    "full": {"prompt_tokens_per_request": 50.0, "train": {"flops": 4e12, "seconds": 60.0, "peak_memory_bytes": 4e9}},
}


def test_savings_are_the_share_of_prompt_tokens_that_the_tuned_arm_does_without() -> None:
    found = savings(ARMS, "lora", "few_shot", 1_000_000)
    assert found["prompt_tokens_saved_fraction"] == 0.75
    assert found["prompt_tokens_saved_per_request"] == 150
    assert found["flops_saved_per_request"] == 2 * 1_000_000 * 150
    assert found["break_even_requests"] == 10_000


def test_longer_answers_count_against_what_a_shorter_prompt_saves() -> None:
    arms = {
        "few_shot": {"prompt_tokens_per_request": 300.0, "completion_tokens_per_request": 8.0},
        "lora": {**ARMS["lora"], "completion_tokens_per_request": 108.0},
    }
    found = savings(arms, "lora", "few_shot", 1_000_000)
    assert found["prompt_tokens_saved_per_request"] == 250
    assert found["tokens_saved_per_request"] == 150
    assert found["break_even_requests"] == 10_000
    arms["lora"]["completion_tokens_per_request"] = 400.0
    assert savings(arms, "lora", "few_shot", 1_000_000)["break_even_requests"] is None


def test_an_arm_that_reads_more_saves_a_negative_share_and_never_breaks_even() -> None:
    arms = {"base": {"prompt_tokens_per_request": 40.0}, "lora": ARMS["lora"]}
    found = savings(arms, "lora", "base", 1_000_000)
    assert found["prompt_tokens_saved_fraction"] == -0.25
    assert found["break_even_requests"] is None


def test_tokens_of_a_prompt_do_not_meet_the_head() -> None:
    arms = {
        "few_shot": {"prompt_tokens_per_request": 300.0, "completion_tokens_per_request": 20.0},
        "lora": {**ARMS["lora"], "completion_tokens_per_request": 8.0},
    }
    found = savings(arms, "lora", "few_shot", 1_000_000, 200_000)
    assert found["flops_saved_per_request"] == 2 * (250 * 800_000 + 12 * 1_000_000)
    assert found["break_even_requests"] == 7076  # 3e12 / 424e6


def test_tokens_of_another_model_are_counted_and_not_priced_at_this_ones_size() -> None:
    found = savings(ARMS, "lora", "few_shot", None)
    assert found["prompt_tokens_saved_fraction"] == 0.75
    assert found["tokens_saved_per_request"] == 150
    assert found["flops_saved_per_request"] is None
    assert found["break_even_requests"] is None


UNMEASURED = [{}, {"lora": ARMS["lora"]}, {"lora": {}, "few_shot": {"prompt_tokens_per_request": None}}]


@pytest.mark.parametrize("arms", UNMEASURED)
def test_what_was_not_measured_saves_an_unknown_amount(arms: dict) -> None:
    found = savings(arms, "lora", "few_shot", 1_000_000)
    assert found["prompt_tokens_saved_fraction"] is None
    assert found["break_even_requests"] is None


@given(st.floats(1, 1e18), st.floats(0.02, 1e17))
def test_the_break_even_request_is_the_first_that_repays_training(flops: float, saved: float) -> None:
    requests = break_even_requests(flops, saved)
    assert requests is not None
    assert requests * saved >= flops * (1 - 1e-12)
    assert (requests - 1) * saved < flops * (1 + 1e-12)


def test_the_gain_ratio_matches_a_plain_bootstrap_loop() -> None:
    generator = np.random.default_rng(1)
    full = generator.normal(0.5, 0.5, 120)
    lora = 0.8 * full + generator.normal(0, 0.2, 120)
    found = gain_ratio(lora, full, resamples=3000, seed=3)
    assert found is not None
    assert found.value == pytest.approx(lora.mean() / full.mean())
    ratios = []
    for _ in range(3000):
        rows = [int(generator.integers(120)) for _ in range(120)]
        ratios.append(sum(lora[row] for row in rows) / sum(full[row] for row in rows))
    assert [found.low, found.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.015)


def test_pairing_makes_the_ratio_of_equal_gains_exact() -> None:
    gains = np.random.default_rng(0).normal(1, 1, 200)
    found = gain_ratio(gains, gains.copy())
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == pytest.approx((1, 1, 1, 200))


def test_the_same_seed_gives_the_same_interval() -> None:
    gains = np.random.default_rng(0).normal(1, 1, (2, 50))
    assert gain_ratio(*gains, seed=5) == gain_ratio(*gains, seed=5)


def test_a_share_of_no_gain_is_not_given() -> None:
    scores = {"few_shot": [0.0, 1.0] * 50, "lora": [1.0, 1.0] * 50, "full": [1.0, 0.0] * 50}
    found = lora_versus_full(ARMS, scores, "few_shot")
    assert found["quality_fraction"] is None
    assert "shows no gain" in found["quality_note"]
    assert found["flops_fraction"] == 0.75


def test_lora_is_compared_with_full_in_quality_and_every_cost() -> None:
    generator = np.random.default_rng(0)
    base = (generator.random(400) < 0.2).astype(float)
    scores = {"few_shot": base, "lora": (generator.random(400) < 0.6).astype(float), "full": np.ones(400)}
    found = lora_versus_full(ARMS, scores, "few_shot", resamples=500)
    quality = found["quality_fraction"]
    assert 0.4 < quality["low"] < quality["value"] < quality["high"] < 0.6
    assert (found["seconds_fraction"], found["memory_fraction"], found["checkpoint_fraction"]) == (0.5, 0.25, None)


def test_for_a_loss_the_gain_is_the_fall() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 100)
    scores = {"few_shot": 2 + noise, "lora": 1.5 + noise, "full": 1 + noise}
    assert lora_versus_full(ARMS, scores, "few_shot")["quality_fraction"] is None
    found = lora_versus_full(ARMS, scores, "few_shot", lower_is_better=True)
    assert found["quality_fraction"]["value"] == pytest.approx(0.5)


def test_gains_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        gain_ratio(np.ones(3), np.ones(4))
