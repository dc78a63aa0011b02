"""The page holds the verdict and the numbers, survives what is absent, and runs nothing that a model wrote."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith.errors import FolderError
from tunesmith.report.examples import choose, outcomes, shown_rows
from tunesmith.report.findings import interval
from tunesmith.report.page import print_report, render_page, write_report
from tunesmith.report.record import read_record
from tunesmith.types import Estimate

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)> ![x](http://evil.example/a.png) [bold red]{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def page(whole: Path) -> str:
    return render_page(read_record(whole))


def test_the_page_is_well_formed_and_its_ids_are_unique(page: str, outline: Callable) -> None:
    found = outline(page)
    assert len(found.ids) == len(set(found.ids))
    assert page.startswith("<!doctype html>")


def test_every_link_points_into_the_page(page: str, outline: Callable) -> None:
    found = outline(page)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert not re.findall(r"url\((?!#)|@import|https?:", page)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "img", "form"}


def test_the_page_holds_the_verdict_the_finding_and_its_numbers(page: str, whole: Path, text_of: Callable) -> None:
    text = text_of(page)
    results = json.loads((whole / "results.json").read_text())
    assert "ship" in text
    told_by_the_finding, *others = results["verdict"]["reasons"]
    assert others
    assert all(reason in text for reason in others)
    assert told_by_the_finding not in text
    score, base = (results["arms"][arm]["metrics"]["exact_match"]["value"] for arm in ("lora", "few_shot"))
    assert f"lifts exact_match from {100 * base:.1f}% with few-shot (3 examples) to {100 * score:.1f}% on 200" in text
    for arm in results["arms"].values():
        for estimate in arm["metrics"].values():
            assert f"{100 * estimate['value']:.1f}%" in text
            assert f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}".replace("-", "−") in text
    for contrast in results["contrasts"]:
        assert f"{100 * contrast['difference']['value']:+.1f}".replace("-", "−") in text


@pytest.mark.parametrize(
    "sentence",
    [
        "p < 0.001",
        "repaid after 41,000 requests",
        "LoRA keeps 94% (86% to 102%) of full fine-tuning's gain over the best prompt",
        "67% of its compute, 71% of its time, 49% of its memory, 4% of its checkpoint",
        "This run read the test rows once",
        "The smallest difference this test set can show is 6.2 points (with power 80%, at a level of 95%).",
        "General loss moved by LoRA +0.048",
        "5 min 12 s",
        "2.1 GB",
        "4,884,480",
        "×1.11",
        "dropped: conflict",
        "7,717",
        "citations.jsonl:17",
        "lora.learning_rate",
        "ten times the rate for full fine-tuning of this width",
        "tunesmith run recipe.yaml",
        "splits 0, training 0, evaluation 0",
        "2.13.0",
        "mended by tuning",
        "broken by tuning",
    ],
)
def test_the_page_says(sentence: str, page: str, text_of: Callable) -> None:
    assert sentence in text_of(page)


def test_the_report_is_written_into_the_folder_and_is_the_same_twice(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    folder = make_run(tmp_path / "run", rows=30)
    first = write_report(folder).read_bytes()
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_bytes() == first


def test_a_thousand_rows_fit_in_a_page_under_1_5_megabytes(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "large", rows=1000)
    long = {"prompt": "word " * 1000, "answer": "again " * 1000}
    for path in (folder / "answers").glob("*.jsonl"):
        lines = [json.loads(line) | long for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(folder).stat().st_size < 1_500_000


def test_a_bare_run_has_a_page_that_says_what_is_absent(bare: Path, text_of: Callable) -> None:
    text = text_of(write_report(bare).read_text(encoding="utf-8"))
    for sentence in (
        "not shown",
        "LoRA scores 50.0% exact_match on 40 held-out rows",
        "No paired difference was measured.",
        "General ability was not measured",
        "Not compared",
        "No training log was kept.",
        "No plan was recorded.",
        "Empty: no row was dropped",
        "No answers of a tuned arm",
    ):
        assert sentence in text


GROUPS = [
    ("verdict", "savings", "plan"),
    ("contrasts", "lora_versus_full", "census"),
    ("forgetting", "test_reads", "few_shot"),
    ("data", "machine", "seconds"),
    ("task", "best_prompted", "smallest_difference"),
    ("base", "tunesmith", "arms"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    return make_run(tmp_path_factory.mktemp("small") / "run", rows=20, updates=("lora",))


@pytest.mark.parametrize("keys", GROUPS)
def test_any_part_of_the_results_may_be_absent_or_null(keys: tuple[str, ...], small: Path, outline: Callable) -> None:
    record = read_record(small)
    for key in keys:
        del record.results[key]
    outline(render_page(record))
    record.results.update(dict.fromkeys(keys))
    outline(render_page(record))


@pytest.mark.parametrize(
    "names", [("recipe.yaml", "answers/lora.jsonl"), ("plan.json", "metrics.jsonl", "ledger.jsonl")]
)
def test_any_other_file_may_be_absent(
    names: tuple[str, ...], tmp_path: Path, make_run: Callable[..., Path], outline: Callable
) -> None:
    folder = make_run(tmp_path / "run", rows=20, updates=("lora",))
    for name in names:
        (folder / name).unlink()
    outline(write_report(folder).read_text(encoding="utf-8"))


def test_numbers_that_are_not_finite_are_shown_as_absent(
    tmp_path: Path, make_run: Callable[..., Path], text_of: Callable
) -> None:
    folder = make_run(tmp_path / "run", rows=20)
    text = re.sub(r'"value": [-\d.e]+', '"value": NaN', (folder / "results.json").read_text())
    (folder / "results.json").write_text(text)
    assert "nan" not in text_of(write_report(folder).read_text(encoding="utf-8")).lower().split()


def test_nothing_that_a_user_or_a_model_wrote_becomes_markup(
    tmp_path: Path, make_run: Callable[..., Path], outline: Callable
) -> None:
    folder = make_run(tmp_path / "run", rows=12, updates=("lora",))
    spare = {"ship", "exact_match", "chrf", "few_shot", "lora"}
    for path in [*folder.glob("*.json"), *folder.rglob("*.jsonl")]:
        lines = [json.dumps(_attacked(json.loads(line), spare)) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n")
    found = outline(write_report(folder).read_text(encoding="utf-8"))
    assert not found.tags & {"script", "img"}
    words = " ".join(found.words)
    assert words.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in words


def _attacked(value: object, spare: set[str]) -> object:
    """Every text replaced by an attack, but for the names that hold the results together."""
    if isinstance(value, dict):
        fixed = {"id", "a", "b", "arm", "metric"}
        return {key: child if key in fixed else _attacked(child, spare) for key, child in value.items()}
    if isinstance(value, list):
        return [_attacked(child, spare) for child in value]
    return ATTACK if isinstance(value, str) and value not in spare else value


def test_the_examples_are_a_third_each_mended_broken_and_wrong() -> None:
    groups = {"mended": list("abcdef"), "broken": list("ghijkl"), "wrong": list("mnopqr"), "right": list("stu")}
    chosen = choose(groups)
    assert [name for name, _ in chosen] == ["mended"] * 4 + ["broken"] * 4 + ["wrong"] * 4


def test_rare_outcomes_leave_their_places_to_the_others() -> None:
    chosen = choose({"mended": list("abc"), "broken": ["d"], "right": list("efghijklmnop")})
    assert [name for name, _ in chosen].count("right") == 8
    assert len(chosen) == len(set(chosen)) == 12


def test_every_row_that_both_arms_answered_has_one_outcome(whole: Path) -> None:
    groups = outcomes(read_record(whole))
    rows = [row for group in groups.values() for row in group]
    assert len(rows) == len(set(rows)) == 200


def test_an_example_shows_every_arm_and_marks_right_and_wrong(whole: Path) -> None:
    for row in shown_rows(read_record(whole)):
        assert len(row.answers) == 7
        marks = {answer.label: answer.mark for answer in row.answers}
        expected = {"mended": ("wrong", "right"), "broken": ("right", "wrong"), "wrong": ("wrong", "wrong")}
        assert (marks["few-shot (3 examples)"], marks["LoRA"]) == expected[row.outcome]


def test_a_metric_between_0_and_1_compares_scores_instead_of_right_and_wrong(
    tmp_path: Path, make_run: Callable[..., Path], outline: Callable
) -> None:
    folder = make_run(tmp_path / "run", rows=40)
    content = json.loads((folder / "results.json").read_text())
    content["task"]["metric"] = "chrf"
    (folder / "results.json").write_text(json.dumps(content))
    assert set(outcomes(read_record(folder))) <= {"mended", "broken", "unchanged"}
    outline(write_report(folder).read_text(encoding="utf-8"))


def test_a_folder_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"no results\.json.*\n.*tunesmith run"):
        write_report(tmp_path)


def test_a_damaged_log_line_is_named(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", rows=20)
    (folder / "metrics.jsonl").write_text('{"arm": "lora"}\n{"arm": \n{"arm": "lora"}\n')
    with pytest.raises(FolderError, match=r"metrics\.jsonl:2"):
        write_report(folder)


def test_the_terminal_shows_the_verdict_and_the_scores(whole: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    print_report(whole, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("SHIP", "lifts exact_match", "few-shot (3 examples)", "nearest neighbour", "−86%", "+0.048"):
        assert words in printed


def test_the_terminal_prints_markup_as_it_was_written(bare: Path) -> None:
    content = json.loads((bare / "results.json").read_text())
    content["verdict"]["reasons"] = ["[bold red]hello[/]"]
    (bare / "results.json").write_text(json.dumps(content))
    console = Console(file=io.StringIO(), width=100)
    print_report(bare, console)
    assert "[bold red]hello[/]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_starts_without_torch() -> None:
    code = "import sys, tunesmith.report.page; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0


def test_headlines_speak_of_the_arm_that_validation_chose(
    tmp_path: Path, make_run: Callable[..., Path], text_of: Callable
) -> None:
    folder = make_run(tmp_path / "run", rows=20)
    record = read_record(folder)
    assert record.subject == "lora"
    record.results["subject"] = "full"
    assert record.subject == "full"
    assert "Tuning with full fine-tuning lifts" in text_of(render_page(record))


@pytest.mark.parametrize(("level", "told"), [(0.999, "99.9%"), (0.975, "97.5%"), (2 * 0.95 - 1, "90%")])
def test_an_interval_is_told_with_its_very_level(level: float, told: str) -> None:
    found = Estimate(value=0.5, low=0.4, high=0.6, n=100, level=level)
    assert interval("exact_match", found).startswith(f"{told} interval ")


def test_a_prompt_that_is_no_shorter_may_be_repaid_by_shorter_answers(
    make_run: Callable[..., Path], tmp_path: Path, text_of: Callable
) -> None:
    record = read_record(make_run(tmp_path / "run", rows=20))
    record.results["savings"] |= {"prompt_tokens_saved_fraction": 0.0, "break_even_requests": 670}
    words = text_of(render_page(record))
    assert "by its shorter answers training is repaid after about 670 requests" in words
    assert "repaid by shorter answers after 670 requests" in words
    record.results["savings"]["break_even_requests"] = None
    assert "training is not repaid in tokens" in text_of(render_page(record))


def test_a_student_is_told_beside_its_teacher(make_run: Callable[..., Path], tmp_path: Path, text_of: Callable) -> None:
    folder = make_run(tmp_path / "student", updates=("lora",))
    found = json.loads((folder / "results.json").read_text())
    found["arms"]["teacher"] = found["arms"].pop("few_shot")
    found["best_prompted"], found["subject"] = "teacher", "lora"
    found["savings"]["prompted"] = "teacher"
    difference = {"value": 0.004, "low": -0.021, "high": 0.029, "n": 200, "level": 0.9}
    found["distill"] = {
        "teacher": "https://api.example/v1",
        "model": "big",
        "inputs": 1200,
        "answers": 1300,
        "dropped": {"answers disagree": 31},
        "judged_by": "references",
        "spent": {"prompt_tokens": 70_000, "completion_tokens": 9_000, "cost": 1.25},
        "equivalence": {"margin": 0.05, "difference": difference, "finding": "equivalent"},
    }
    (folder / "results.json").write_text(json.dumps(found))
    words = text_of(render_page(read_record(folder)))
    assert "LoRA without the prompt is equivalent to the teacher, with 86% fewer prompt tokens" in words
    assert "+0.4 points, 90% interval −2.1 to +2.9, margin ±5.0 points" in words
    assert "student − teacher: equivalent" in words
    assert "big at https://api.example/v1" in words
    assert "left out: answers disagree 31" in words
    assert "cost at the prices given 1.25" in words


def test_a_run_without_a_teacher_says_nothing_of_one(page: str) -> None:
    assert "collecting answers" not in page
    assert "student −" not in page
