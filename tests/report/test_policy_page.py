"""A policy's page says whether it wins, how far from its base, and what else changed on the way."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tunesmith.report.page import print_report, render_page, write_report
from tunesmith.report.policy_charts import over_optimisation_chart, rollouts_chart, side_effects_chart
from tunesmith.report.record import RunRecord, read_record

PROMPTS = 250
ATTACK = "<script>alert(1)</script>{{ 7 * 7 }}"
BASE_ANSWERS = (
    "The food was okay, but the service was slow and we waited for an hour.",
    "It is a film about a man who goes to the city. It was not good and it was not bad, it was a film.",
    "I would not buy this again. The handle broke after two days.",
    "The room was small and it smelled of smoke, although the bed was fine.",
)
TUNED_ANSWERS = (
    "The food was wonderful, the staff were kind, and we had a lovely evening together.",
    "A warm and funny film with a great cast, and I enjoyed every minute of it.",
    "I love it! It works perfectly, it looks beautiful, and it is great, great value.",
    "The room was bright and comfortable, and the people at the desk were very helpful.",
)
SUBJECTS = ("last night's dinner", "the film you saw", "the pan you bought", "the hotel")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """The run folder of a PPO run; tests only read it."""
    folder = make_run(tmp_path_factory.mktemp("policy") / "sentiment_ppo", rows=4, updates=("lora",))
    shutil.rmtree(folder / "answers")
    (folder / "answers").mkdir()
    old = json.loads((folder / "results.json").read_text())
    kept = {key: old[key] for key in ("census", "machine", "tunesmith", "forgetting", "plan")}
    scores = write_answers(folder)
    write(folder / "results.json", kept | results(scores))
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def around(values: np.ndarray) -> dict[str, float]:
    half = 1.96 * values.std() / np.sqrt(len(values))
    mean = float(values.mean())
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values), "level": 0.95}


def write_answers(folder: Path, tuned: tuple[str, ...] = TUNED_ANSWERS) -> dict[str, dict[str, np.ndarray]]:
    """Both arms' answers; returns metric to scores, by arm."""
    draw = np.random.default_rng(1)
    judge = {"base": draw.normal(-0.1, 1.0, PROMPTS)}
    judge["lora"] = judge["base"] * 0.4 + draw.normal(0.9, 1.1, PROMPTS)
    found = {}
    for arm, texts in (("base", BASE_ANSWERS), ("lora", tuned)):
        rise = 0.35 if arm == "lora" else 0.0
        found[arm] = {
            "judge_score": judge[arm],
            "reward_score": judge[arm] + rise + draw.normal(0, 0.3, PROMPTS),
            "length_tokens": draw.integers(14, 24, PROMPTS) + 11 * rise,
            "repetition": draw.uniform(0, 0.05 + 0.1 * rise, PROMPTS),
            "unended": (draw.random(PROMPTS) < 0.02).astype(float),
            "sentiment": np.tanh(judge[arm]),
        }
        lines = [
            {
                "id": f"{row:04x}",
                "prompt": [{"role": "user", "content": f"Write a line about {SUBJECTS[row % 4]} ({row})."}],
                "reference": "",
                "answer": texts[row % 4],
                "scores": {name: float(values[row]) for name, values in found[arm].items()},
            }
            for row in range(PROMPTS)
        ]
        (folder / "answers" / f"{arm}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def results(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """results.json of `method: ppo`."""
    train = {"seconds": 812.0, "tokens": 904_340, "steps": 480, "best_step": 256, "flops": 9.1e13, "rollouts": 40}
    train |= {"peak_memory_bytes": 2.6e9, "trainable_parameters": 4_884_480, "learning_rate": 1e-4}
    arms: dict[str, Any] = {
        arm: {
            "metrics": {name: around(values) for name, values in metrics.items()},
            "completion_tokens_per_request": float(metrics["length_tokens"].mean()),
            "prompt_tokens_per_request": 33.1,
            "seconds": 21.0,
        }
        for arm, metrics in scores.items()
    }
    arms["lora"]["train"] = train | {"checkpoint_bytes": 1.95e7}
    return {
        "schema": 1,
        "method": "ppo",
        "base": "runs/sft",
        "verdict": {
            "decision": "ship",
            "reasons": [
                "wins more often than not against the model it began as",
                "General loss changed by +0.048 nats per token, within the limit of 0.2.",
            ],
        },
        "subject": "lora",
        "task": {"metric": "judge_score"},
        "arms": arms,
        "win_rate": around((scores["lora"]["judge_score"] > scores["base"]["judge_score"]).astype(float)),
        "win_rate_by": "judge",
        "kl": {"value": 11.84, "low": 11.02, "high": 12.71, "n": PROMPTS, "level": 0.95},
        "contrasts": [
            {
                "a": "lora",
                "b": "base",
                "metric": metric,
                "difference": around(scores["lora"][metric] - scores["base"][metric]),
                "p_value": 0.4 if metric == "unended" else 1e-12,
            }
            for metric in scores["base"]
        ],
        "curve": curve(),
        "rollouts": rollouts(),
        "data": {"train": 2000, "valid": 128, "test": PROMPTS},
        "seconds": 1411.0,
    }


def curve() -> list[dict[str, Any]]:
    """Looks at the validation prompts: the proxy goes on rising, the judge turns."""
    distances = [0.0, 1.9, 4.6, 8.3, 12.1, 16.4, 20.9, 25.2]
    return [
        {
            "step": 60 * number,
            "kl": kl,
            "reward_score": -0.08 + 0.42 * np.sqrt(kl) - 0.005 * kl,
            "judge_score": -0.1 + 0.46 * np.sqrt(kl) - 0.066 * kl,
            "length_tokens": 18.7 + 0.33 * kl + 0.012 * kl**2,
            "repetition": 0.026 + 0.0002 * kl**2,
            "win_rate": 0.5 + 0.31 * np.sin(min(kl, 24) / 24 * np.pi * 0.85),
            "chosen": number == 4,
        }
        for number, kl in enumerate(distances)
    ]


def rollouts(count: int = 40) -> list[dict[str, Any]]:
    """Training rollouts."""
    draw = np.random.default_rng(2)
    return [
        {
            "rollout": number,
            "score": -0.1 + 1.9 * (1 - np.exp(-number / 14)) + 0.08 * draw.standard_normal(),
            "score_sd": 1.0 - 0.012 * number,
            "kl": 25 * (number / count) ** 1.2 + 0.5 * draw.random(),
            "kl_coefficient": 0.05,
            "length_tokens": 19 + 0.2 * number,
            "repetition": 0.03,
            "entropy": 1.9 - 0.03 * number + 0.05 * draw.standard_normal(),
            "unended": max(0.0, 0.06 - 0.002 * number + 0.01 * draw.standard_normal()),
            "unscored": float(number == 3),
        }
        for number in range(count)
    ]


@pytest.fixture
def record(aligned: Path) -> RunRecord:
    return read_record(aligned)


@pytest.fixture(scope="module")
def page(aligned: Path) -> str:
    return render_page(read_record(aligned))


def test_the_page_is_well_formed_and_every_link_points_into_it(page: str, outline: Callable) -> None:
    found = outline(page)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert not found.tags & {"script", "iframe", "link", "img"}


def test_the_same_run_gives_the_same_page(page: str, record: RunRecord) -> None:
    assert render_page(record) == page


@pytest.mark.parametrize(
    "sentence",
    [
        "of 250 held-out prompts by the judge (95% interval 82.6 to 91.0), 11.8 nats per sequence away from it.",
        "General loss changed by +0.048 nats per token, within the limit of 0.2.",
        "Chosen at 12.1 nats: judge +0.802, proxy +1.400; farthest out the proxy was higher, the judge lower",
        "Answers went from 19 to 24 tokens",
        "judge score",
        "cut off",
        "LoRA beats its baseline",
        "won by tuning",
        "Over all rollouts, unscored answers: 1.",
        "largest win: +",
        "largest loss: −",
        "drawn at random: ",
        "General loss moved by LoRA +0.048",
        "14 min",
        "dropped: conflict",
    ],
)
def test_the_page_says(sentence: str, page: str, text_of: Callable) -> None:
    assert sentence in text_of(page)


def test_examples_show_both_answers_to_one_prompt_with_their_scores(
    page: str, record: RunRecord, text_of: Callable
) -> None:
    base, tuned = ({line["id"]: line for line in record.answers[arm]} for arm in ("base", "lora"))
    gains = {row: tuned[row]["scores"]["judge_score"] - base[row]["scores"]["judge_score"] for row in base}
    text = text_of(page)
    for row in (max(gains, key=lambda row: gains[row]), min(gains, key=lambda row: gains[row])):
        assert f"prompt {base[row]['prompt'][0]['content']} " in text
        for line in (base[row], tuned[row]):
            assert f"judge score {line['scores']['judge_score']:.3f}".replace("-", "−") in text


def test_other_seeds_draw_other_examples(page: str, record: RunRecord, text_of: Callable) -> None:
    first = text_of(page)
    record.recipe["evaluate"]["seed"] = 7
    assert text_of(render_page(record)).partition("drawn at random")[2] != first.partition("drawn at random")[2]


def test_dpo_without_reward_models_is_judged_on_pairs(record: RunRecord, text_of: Callable) -> None:
    results = record.results
    results |= {"method": "dpo", "task": {"metric": "pair_accuracy"}}
    for key in ("win_rate", "win_rate_by", "rollouts"):
        del results[key]
    for value, arm in zip((0.52, 0.71), results["arms"].values(), strict=True):
        arm["metrics"] = {"pair_accuracy": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 300}}
    difference = {"value": 0.19, "low": 0.12, "high": 0.26, "n": 300, "level": 0.95}
    results["contrasts"] = [
        {"a": "lora", "b": "base", "metric": "pair_accuracy", "difference": difference, "p_value": 1e-5}
    ]
    results["curve"] = [{"step": 10, "kl": 1.0, "valid_loss": 0.6}, {"step": 20, "kl": 2.0, "valid_loss": 0.5}]
    text = text_of(render_page(record))
    assert "Tuning with LoRA lifts pair accuracy from 52.0% with base model to 71.0% on 300 held-out rows" in text
    assert "Scores against distance from the base were not recorded." in text
    assert "Validation loss fell" in text
    assert "No answers of base and tuned model" in text


def test_dpo_that_nothing_judged_claims_neither_wins_nor_losses(record: RunRecord, text_of: Callable) -> None:
    record.results.update({"method": "dpo", "task": {"metric": "length_tokens"}})
    for key in ("win_rate", "win_rate_by", "rollouts"):
        del record.results[key]
    text = text_of(render_page(record))
    assert (
        "DPO with LoRA moved the model 11.8 nats per sequence away from runs/sft. Nothing judged its answers." in text
    )
    assert "drawn at random" in text
    for claim in ("largest win", "won by tuning", "beats", "scores best"):
        assert claim not in text


def test_dpo_judged_by_a_function_is_not_said_to_have_trained_on_it(record: RunRecord, text_of: Callable) -> None:
    record.results.update({"method": "dpo", "win_rate_by": "reward", "task": {"metric": "reward"}})
    for point in record.results["curve"]:
        point["reward"] = point.pop("reward_score")
        del point["judge_score"]
    text = text_of(render_page(record))
    assert "by the reward function" in text
    for claim in ("trained on cannot show", "The reward that was trained on", "by the reward model"):
        assert claim not in text


def test_a_function_that_rewards_is_drawn_as_the_proxy(record: RunRecord) -> None:
    for point in record.results["curve"]:
        point["reward"] = point.pop("reward_score")
    chart = over_optimisation_chart(record)
    assert chart is not None
    assert chart.title.startswith("Chosen at 12.1 nats: judge +0.802, proxy +1.400")
    assert "proxy: the reward trained on" in chart.svg


def test_a_limit_that_looks_lie_beyond_is_drawn(record: RunRecord) -> None:
    record.recipe["policy"] = {"kl_limit": 18.0}
    before = over_optimisation_chart(record)
    for point in record.results["curve"]:
        point["beyond_limit"] = max(point["kl"] - 18.0, 0.0)
    after = over_optimisation_chart(record)
    assert before
    assert after
    assert "policy.kl_limit" in after.svg
    assert "policy.kl_limit" not in before.svg


def test_without_a_judge_the_page_says_what_the_reward_cannot_show(record: RunRecord, text_of: Callable) -> None:
    record.results.update({"win_rate_by": "reward", "task": {"metric": "reward_score"}})
    for point in record.results["curve"]:
        del point["judge_score"]
    text = text_of(render_page(record))
    assert "by the reward it was trained on" in text
    assert "No judge scored this run." in text
    assert "The reward that was trained on, with no judge beside it" in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.44, 0.58, "is not shown to win against runs/sft: it wins on 51.0%"),
        (0.30, 0.48, "loses to runs/sft: it wins on 39.0%"),
    ],
)
def test_a_win_is_claimed_only_where_the_interval_lies_above_one_half(
    low: float, high: float, words: str, record: RunRecord, text_of: Callable
) -> None:
    record.results["win_rate"] |= {"value": (low + high) / 2, "low": low, "high": high}
    assert words in text_of(render_page(record))


def test_a_handful_of_prompts_claims_no_win(record: RunRecord, text_of: Callable) -> None:
    record.results["win_rate"] |= {"value": 1.0, "low": 0.51, "high": 1.0, "n": 4}
    assert "is not shown to win against runs/sft" in text_of(render_page(record))


def test_a_distance_below_0_has_a_minus_and_no_sign_where_it_rounds_to_0(record: RunRecord, text_of: Callable) -> None:
    record.results["kl"] |= {"value": -0.01, "low": -0.3, "high": 0.2}
    text = text_of(render_page(record))
    assert "0.0 nats per sequence away" in text
    assert "nats per sequence, −0.3 to 0.2" in text
    assert "−0.0 nats" not in text


@pytest.mark.parametrize(
    "keys",
    [
        ("arms", "verdict", "curve"),
        ("win_rate", "contrasts", "rollouts"),
        ("kl", "forgetting", "plan"),
        ("base", "task", "subject"),
    ],
)
def test_any_part_of_the_results_may_be_null_or_absent(
    keys: tuple[str, ...], record: RunRecord, outline: Callable
) -> None:
    record.results.update(dict.fromkeys(keys))
    outline(render_page(record))
    for key in keys:
        del record.results[key]
    outline(render_page(record))


def test_a_curve_with_holes_or_one_point_is_drawn_as_far_as_it_goes(record: RunRecord) -> None:
    record.results["curve"][3] |= {"judge_score": None, "length_tokens": float("nan")}
    assert over_optimisation_chart(record) is not None
    assert side_effects_chart(record) is not None
    record.results["curve"] = record.results["curve"][:1]
    record.results["rollouts"] = record.results["rollouts"][:1]
    assert over_optimisation_chart(record) is side_effects_chart(record) is rollouts_chart(record) is None


def test_nothing_that_a_model_wrote_becomes_markup(aligned: Path, tmp_path: Path, outline: Callable) -> None:
    folder = shutil.copytree(aligned, tmp_path / "run")
    write_answers(folder, (ATTACK,) * 4)
    found = outline(write_report(folder).read_text(encoding="utf-8"))
    assert not found.tags & {"script", "img"}
    assert " ".join(found.words).count(ATTACK) == 9


def test_the_terminal_shows_the_verdict_both_arms_and_the_distance(aligned: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_report(aligned, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "SHIP",
        "wins against runs/sft",
        "base model",
        "LoRA",
        "judge score",
        "answer tokens",
        "(KL): 11.8",
        "14 min",
    ):
        assert words in printed
