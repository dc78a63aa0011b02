"""A reward model's page says how often it chooses as people did, against what, and how sure it was."""

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
from tunesmith.report.record import read_record
from tunesmith.report.reward_page import by_length_chart, calibration_chart

PAIRS = 1400
ATTACK = "<script>alert(1)</script>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """The run folder of a reward model and its judge; tests only read it."""
    folder = make_run(tmp_path_factory.mktemp("reward") / "sentiment_reward", rows=4, updates=("lora",))
    shutil.rmtree(folder / "answers")
    old = json.loads((folder / "results.json").read_text())
    write(folder / "results.json", {**{key: old[key] for key in ("census", "machine", "tunesmith")}, **results()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log()))
    return folder


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def share(value: float, n: int = PAIRS, spread: float = 0.5) -> dict[str, float]:
    half = 1.96 * spread * 2 * np.sqrt(max(value * (1 - value), 0.01) / n) if 0 < value < 1 else 0.02
    return {"value": value, "low": value - half, "high": min(value + half, 1), "n": n, "level": 0.95}


def results() -> dict[str, Any]:
    """results.json of `method: reward`."""
    bins = [(0.5, 0.55, 0.57, 90), (0.6, 0.65, 0.63, 110), (0.7, 0.75, 0.72, 140), (0.8, 0.85, 0.81, 230)]
    bins += [(0.9, 0.97, 0.975, 830)]
    lengths = [("chosen at least 10 tokens shorter", 0.79, 212), ("within 10 tokens", 0.87, 861)]
    lengths += [("chosen at least 10 tokens longer", 0.914, 327)]
    difference = {"length": (0.307, 0.279, 0.334), "untrained": (0.362, 0.331, 0.392), "judge": (0.013, -0.004, 0.031)}
    return {
        "schema": 1,
        "method": "reward",
        "base": "smollm2-135m-instruct",
        "verdict": {
            "decision": "ship",
            "reasons": [
                "right on 86.9% of 1400 held-out pairs (85.1% to 88.7%)",
                "+30.7% against choosing the longer answer (+27.9% to +33.4%)",
            ],
        },
        "subject": "reward",
        "models": {"reward": model(0.869, 401.0), "judge": model(0.856, 397.0)},
        "baselines": {"length": {"pair_accuracy": share(0.562)}, "untrained": {"pair_accuracy": share(0.507)}},
        "contrasts": [
            {
                "a": "reward",
                "b": other,
                "metric": "pair_accuracy",
                "difference": {"value": value, "low": low, "high": high, "n": PAIRS, "level": 0.95},
                "p_value": 0.16 if other == "judge" else 1e-40,
            }
            for other, (value, low, high) in difference.items()
        ],
        "agreement": share(0.882),
        "calibration": [
            {"low": low, "high": low + 0.1, "predicted": predicted, "right": share(right, n), "n": n}
            for low, predicted, right, n in bins
        ],
        "by_length": [{"label": label, "pair_accuracy": share(right, n), "n": n} for label, right, n in lengths],
        "scores": {"chosen": {"mean": 1.213, "sd": 1.42}, "rejected": {"mean": -1.187, "sd": 1.51}},
        "plan": {
            name: {
                "predicted": {"seconds": 381.0, "peak_memory_bytes": 2.3e9, "flops": 5.0e13},
                "measured": {"seconds": 401.0, "peak_memory_bytes": 2.1e9, "flops": 5.1e13},
            }
            for name in ("reward", "judge")
        },
        "data": {"train": 11203, "valid": 508, "test": PAIRS},
        "seconds": 911.0,
    }


def model(accuracy: float, seconds: float) -> dict[str, Any]:
    """One reward model: its accuracy and what training took."""
    train = {"seconds": seconds, "tokens": 604_340, "steps": 175, "best_step": 175, "flops": 5.1e13}
    train |= {"peak_memory_bytes": 2.1e9, "trainable_parameters": 4_885_056, "learning_rate": 4e-4}
    return {"pair_accuracy": share(accuracy), "pairs": 5602, "train": train | {"checkpoint_bytes": 1.95e7}}


def log() -> list[dict[str, Any]]:
    """metrics.jsonl of both models."""
    draw = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for arm, floor in (("reward", 0.33), ("judge", 0.35)):
        for step in range(1, 176):
            loss = floor + 0.36 * np.exp(-step / 40) + 0.05 * draw.standard_normal()
            lines.append({"arm": arm, "step": step, "loss": loss, "accuracy": 0.8})
            if step in (1, 44, 88, 132, 175):
                valid = floor + 0.36 * np.exp(-step / 45)
                lines.append({"arm": arm, "step": step, "valid_loss": valid, "valid_metric": 0.98 - valid / 3})
    return lines


def answers(rows: int = 40, text: str = "A film to forget.") -> list[dict[str, Any]]:
    """answers/reward.jsonl, should a run leave one."""
    return [
        {
            "id": f"{row:04x}",
            "prompt": f"Say what you think of film {row}.",
            "chosen": "A warm, funny and clever film that earns every one of its laughs.",
            "rejected": text,
            "scores": {"chosen": 1.5 - 0.1 * row, "rejected": -1.0},
        }
        for row in range(rows)
    ]


@pytest.fixture(scope="module")
def page(rewarded: Path) -> str:
    return render_page(read_record(rewarded))


def test_the_page_is_well_formed_and_every_link_points_into_it(page: str, outline: Callable) -> None:
    found = outline(page)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert not found.tags & {"script", "iframe", "link", "img"}


@pytest.mark.parametrize(
    "sentence",
    [
        "The reward model chooses as people did on 86.9% of 1,400 held-out pairs (95% interval 85.1 to 88.7); "
        "taking the longer answer each time does so on 56.2%.",
        "They choose alike on 88.2% of 1,400 held-out pairs",
        "+30.7% against choosing the longer answer",
        "reward model scores best with 86.9%, then judge with 85.6%",
        "reward model beats both baselines",
        "Well calibrated: 87.6% confidence, 86.9% right",
        "Least often right where chosen at least 10 tokens shorter: 79.0%",
        "Validation loss fell",
        "−1.187",
        "4,885,056",
        "dropped: conflict",
        "tunesmith run recipe.yaml",
    ],
)
def test_the_page_says(sentence: str, page: str, text_of: Callable) -> None:
    assert sentence in text_of(page)


def test_several_pairs_of_a_prompt_are_told(rewarded: Path, text_of: Callable) -> None:
    record = read_record(rewarded)
    record.results["data"]["test"] = 2 * PAIRS
    assert f"of {2 * PAIRS:,} held-out pairs of {PAIRS:,} prompts" in text_of(render_page(record))


def test_what_was_not_measured_leaves_a_page_that_says_so(rewarded: Path, text_of: Callable) -> None:
    record = read_record(rewarded)
    for key in ("agreement", "calibration", "by_length", "scores", "contrasts", "plan", "baselines"):
        del record.results[key]
    del record.results["models"]["judge"]
    text = text_of(render_page(record))
    for sentence in (
        "preference.halves: true trains one",
        "Calibration was not measured.",
        "Accuracy by length difference was not measured.",
        "Taking the longer answer was not measured beside it.",
    ):
        assert sentence in text
    assert (calibration_chart(record), by_length_chart(record)) == (None, None)
    assert "Test pairs" not in text


@pytest.mark.parametrize("keys", [("models", "verdict", "by_length"), ("calibration", "agreement", "baselines")])
def test_any_part_of_the_results_may_be_null(keys: tuple[str, ...], rewarded: Path, outline: Callable) -> None:
    record = read_record(rewarded)
    record.results.update(dict.fromkeys(keys))
    outline(render_page(record))


def test_recorded_pairs_are_shown_with_the_surest_mistakes_first(
    rewarded: Path, tmp_path: Path, outline: Callable
) -> None:
    folder = shutil.copytree(rewarded, tmp_path / "run")
    (folder / "answers").mkdir()
    lines = answers(text=ATTACK)
    (folder / "answers" / "reward.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outline(write_report(folder).read_text(encoding="utf-8"))
    words = " ".join(" ".join(found.words).split())
    assert words.index("Test pairs") < words.index("Reproduce")
    assert words.index("surest mistake prompt Say") < words.index("film 39.") < words.index("drawn at random")
    assert "25 chosen as people did (62%)" in words
    assert ATTACK in words
    assert "script" not in found.tags


def test_the_terminal_shows_the_verdict_and_every_model(rewarded: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_report(rewarded, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "SHIP",
        "86.9%",
        "reward model",
        "judge",
        "longer answer",
        "untrained head",
        "agreement",
        "6 min 41 s",
    ):
        assert words in printed


def test_a_model_that_is_surer_than_right_is_told_so(rewarded: Path) -> None:
    record = read_record(rewarded)
    record.results["calibration"] = [{"predicted": 0.95, "right": share(0.8, 300), "n": 300}]
    chart = calibration_chart(record)
    assert chart is not None
    assert chart.title == "Too sure of itself: 95.0% confidence, 80.0% right"
