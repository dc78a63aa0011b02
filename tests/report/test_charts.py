"""Charts say what they found, take their colours from the page, and come out the same every time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from tunesmith.report import charts
from tunesmith.report.record import RunRecord, read_record

ALL = [
    charts.arms_chart,
    charts.differences_chart,
    charts.curves_chart,
    charts.forgetting_chart,
    charts.tokens_chart,
]


@pytest.fixture(scope="module")
def run(whole: Path) -> RunRecord:
    return read_record(whole)


@pytest.fixture(scope="module")
def drawn(run: RunRecord) -> list[charts.Chart]:
    return [draw(run) for draw in ALL]


def test_a_chart_is_well_formed_labelled_and_free_of_links(drawn: list[charts.Chart]) -> None:
    for chart in drawn:
        root = ElementTree.fromstring(chart.svg.replace("xlink:href", "href"))
        assert root.get("role") == "img"
        assert root.get("aria-label") == chart.alt
        assert chart.title
        assert "http" not in chart.svg
        assert "<script" not in chart.svg


def test_the_same_run_draws_the_same_bytes(drawn: list[charts.Chart], run: RunRecord) -> None:
    assert [draw(run) for draw in ALL] == drawn


def test_no_two_charts_share_an_id(drawn: list[charts.Chart]) -> None:
    ids = [name for chart in drawn for name in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_chart_has_its_target(drawn: list[charts.Chart]) -> None:
    for chart in drawn:
        wanted = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', chart.svg))
        assert {a or b for a, b in wanted} <= set(re.findall(r'\bid="([^"]+)"', chart.svg))


def test_every_colour_is_a_variable_of_the_page(drawn: list[charts.Chart]) -> None:
    for chart in drawn:
        without = re.sub(r"var\(--[a-z-]+, #[0-9a-f]{6}\)", "", chart.svg)
        assert not re.findall(r"#[0-9a-f]{6}\b", without)


def test_drawing_leaves_the_settings_of_matplotlib_alone(run: RunRecord) -> None:
    before = dict(mpl.rcParams)
    charts.arms_chart(run)
    assert dict(mpl.rcParams) == before


def test_titles_state_the_finding(drawn: list[charts.Chart]) -> None:
    assert [chart.title for chart in drawn] == [
        "LoRA scores best with 74.5%, then full fine-tuning with 71.5%",
        "LoRA beats all 5 baselines; full fine-tuning beats all 5 baselines",
        "Validation loss fell: LoRA 2.212 to 0.433, full fine-tuning 2.162 to 0.383",
        "General loss moved by LoRA +0.048, full fine-tuning +0.163 nats per token, within the limit of 0.2",
        "LoRA reads 86% fewer prompt tokens than few-shot (3 examples)",
    ]


def test_arms_that_tie_share_the_first_place(bare: Path) -> None:
    chart = charts.arms_chart(read_record(bare))
    assert chart is not None
    assert chart.title == "base model and LoRA score best with 50.0%"


@pytest.mark.parametrize("draw", ALL[1:])
def test_a_chart_without_anything_to_show_is_none(draw: Callable, bare: Path) -> None:
    assert draw(read_record(bare)) is None


def test_a_loss_is_won_by_the_lower_value(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "loss", rows=20)
    text = (folder / "results.json").read_text().replace('"exact_match"', '"completion_loss"')
    (folder / "results.json").write_text(text)
    run = read_record(folder)
    worst = min((run.estimate(arm).value, arm) for arm in run.arms)  # type: ignore[union-attr]
    assert charts.arms_chart(run).title.startswith(charts.words.arm_label(run, worst[1]))  # type: ignore[union-attr]
    assert charts.differences_chart(run).title.startswith("LoRA beats none of 5 baselines")  # type: ignore[union-attr]


def test_markup_and_dollars_in_a_metric_name_are_drawn_as_text(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "odd", rows=20)
    name = "</svg><script>x$\\frac$--> .py:f"
    content = json.loads((folder / "results.json").read_text())
    content["task"]["metric"] = name
    for arm in content["arms"].values():
        arm["metrics"][name] = arm["metrics"].pop("exact_match")
    (folder / "results.json").write_text(json.dumps(content))
    chart = charts.arms_chart(read_record(folder))
    assert chart is not None
    assert "<script" not in chart.svg
    assert "&lt;/svg&gt;&lt;script&gt;x$\\frac$" in chart.svg


def test_a_step_logged_again_after_a_resume_counts_once() -> None:
    steps = [
        {"arm": "lora", "step": 1, "loss": 3.0},
        {"arm": "lora", "step": 2, "loss": 9.0},
        {"arm": "lora", "step": 2, "loss": 2.0},
    ]
    x, y = charts._curve(steps, "lora", "loss")
    assert (list(x), list(y)) == ([1, 2], [3, 2])


def test_smoothing_is_a_running_mean_as_a_plain_loop_takes_it() -> None:
    y = np.random.default_rng(0).normal(size=130)
    half = 130 // 50
    plain = [np.mean(y[max(0, i - half) : i + half + 1]) for i in range(130)]
    assert charts._smooth(np.arange(130.0), y)[1] == pytest.approx(plain)
