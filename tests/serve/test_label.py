"""`tunesmith label` from end to end without a browser: pairs in, choices, preference rows and a summary out."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith import cli
from tunesmith.data.read import read
from tunesmith.errors import DataError, FolderError
from tunesmith.model.load import Model
from tunesmith.recipe import DataSpec, parse_recipe
from tunesmith.screen import Screen
from tunesmith.serve import draw
from tunesmith.serve.choices import Choice, Pair, add_choice, add_pairs, count_equal, opened, read_drawn, read_pairs
from tunesmith.serve.draw import draw_pairs
from tunesmith.serve.label import Source, export, gather, summary
from tunesmith.serve.pairs import given_pairs
from tunesmith.types import Comparison, Message

MakePair = Callable[..., Pair]
Make = Callable[..., dict[str, Any]]
QUIET = Screen(quiet=True)


def rows_file(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def choose(folder: Path, pair: Pair, pick: str, rater: str = "Anna", **changes: Any) -> None:
    fields = {"rater": rater, "pair": pair.id, "repeat": False, "left": "a", "pick": pick, "seconds": 1.0, **changes}
    fields["id"] = f"{rater}{pair.id}{fields['repeat']}"
    with opened(folder) as store:
        add_choice(store, Choice(**fields))


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """`tunesmith label ...` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["tunesmith", "label", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        cli.main()
    except SystemExit as end:
        return int(str(end.code or 0))
    return 0


# Pairs in


def test_given_pairs_are_read_from_either_layout(tmp_path: Path) -> None:
    named = rows_file(tmp_path / "a.jsonl", {"prompt": "p", "answer_a": "x", "answer_b": "y", "model_a": "M"})
    (first,) = given_pairs(named).pairs
    assert (first.a.content, first.b.content, first.model_a, first.model_b, first.gold) == ("x", "y", "M", "", "")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    ranked = rows_file(tmp_path / "b.jsonl", {"prompt": turns, "chosen": "x", "rejected": "y"})
    (second,) = given_pairs(ranked).pairs
    assert [turn.role for turn in second.prompt] == ["system", "user"]
    assert (second.a.content, second.b.content) == ("x", "y")
    (tmp_path / "c.csv").write_text('prompt,answer_a,answer_b\np,"x\nx",y\n')
    assert given_pairs(str(tmp_path / "c.csv")).pairs[0].a.content == "x\nx"


def test_rows_with_equal_answers_are_counted_and_left_out(tmp_path: Path) -> None:
    same = {"prompt": "p", "answer_a": "x", "answer_b": "x"}
    found = given_pairs(rows_file(tmp_path / "a.jsonl", same, {**same, "answer_b": "y"}))
    assert (len(found.pairs), found.equal) == (1, 1)
    with pytest.raises(DataError, match="both answers of every row are equal"):
        given_pairs(rows_file(tmp_path / "b.jsonl", same))


def test_gold_pairs_know_the_better_answer(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
    named = rows_file(tmp_path / "a.jsonl", {**row, "gold": "b"}, {**row, "prompt": "q", "gold": "A"})
    assert [pair.gold for pair in given_pairs(named, gold=True).pairs] == ["b", "a"]
    ranked = rows_file(tmp_path / "b.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    assert [pair.gold for pair in given_pairs(ranked, gold=True).pairs] == ["a"]
    for bad in ({}, {"gold": "left"}):
        with pytest.raises(DataError, match=r"c\.jsonl:1.*better answer is not known"):
            given_pairs(rows_file(tmp_path / "c.jsonl", {**row, **bad}), gold=True)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "answer_a": "x"}, "no other answer"),
        ({"prompt": "p", "completion": "x"}, "cannot make rows"),
        ({"answer_a": "x", "answer_b": "y"}, "needs a prompt"),
    ],
)
def test_a_file_that_holds_no_pairs_is_one_clear_message(row: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        given_pairs(rows_file(tmp_path / "a.jsonl", row))


def test_the_same_file_given_again_adds_nothing(tmp_path: Path, tiny_recipe: Make) -> None:
    recipe = parse_recipe(tiny_recipe())
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
    path = rows_file(tmp_path / "a.jsonl", row)
    assert gather(recipe, tmp_path / "out", Source(pairs=path), QUIET) == 1
    rows_file(tmp_path / "a.jsonl", row, {**row, "prompt": "q"})
    assert gather(recipe, tmp_path / "out", Source(pairs=path), QUIET) == 2
    assert gather(recipe, tmp_path / "out", Source(), QUIET) == 2  # and nothing is drawn beside them


def test_gold_pairs_alone_are_nothing_to_judge(tmp_path: Path, tiny_recipe: Make) -> None:
    pairs = rows_file(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    gold = rows_file(tmp_path / "gold.jsonl", {"prompt": "p", "chosen": "x", "rejected": "y"})
    recipe = parse_recipe(tiny_recipe())
    assert gather(recipe, tmp_path / "out", Source(pairs=pairs, gold=gold), QUIET) == 2
    with pytest.raises(DataError, match="more than two models"):
        gather(recipe, tmp_path / "out", Source(models=("a", "b", "c")), QUIET)


# Pairs drawn


def test_one_model_is_drawn_twice_and_a_second_run_draws_nothing(
    tmp_path: Path, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_recipe())
    count = gather(recipe, tmp_path, Source(prompts=12), QUIET)
    with opened(tmp_path) as store:
        pairs = read_pairs(store)
        assert len(read_drawn(store, "a")) == len(read_drawn(store, "b")) == 12
    assert 0 < count == len(pairs) <= 12
    assert all(pair.a != pair.b and pair.model_a == pair.model_b == recipe.base for pair in pairs.values())
    assert len({pair.prompt for pair in pairs.values()}) == count
    monkeypatch.setattr(draw, "load", None)
    assert gather(recipe, tmp_path, Source(prompts=12), QUIET) == count
    with pytest.raises(FolderError, match="were drawn from"):
        gather(recipe, tmp_path, Source(models=("another",)), QUIET)


def test_prompts_whose_tools_the_template_leaves_out_are_not_drawn(
    tmp_path: Path, tiny_recipe: Make, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"prompt": f"Say {n}", "completion": "x", "tools": tools} for n in range(20)]
    recipe = parse_recipe(tiny_recipe({"data.train": rows_file(tmp_path / "rows.jsonl", *rows)}))
    monkeypatch.setattr(draw, "load", lambda name, world: tiny_model)
    with opened(tmp_path / "store", create=True) as store, pytest.raises(DataError, match="no tool definitions"):
        draw_pairs(recipe, (recipe.base, recipe.base), 10, store, QUIET)


def test_prompts_with_tools_are_drawn_and_it_is_said_that_choices_leave_the_tools_out(
    tmp_path: Path, tiny_recipe: Make, tools_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [{"prompt": f"Say {n}", "completion": "x", **({"tools": tools} if n % 2 else {})} for n in range(20)]
    changes = {"base": str(tools_model_folder), "data.train": rows_file(tmp_path / "rows.jsonl", *rows)}
    recipe = parse_recipe(tiny_recipe(changes))
    asked = draw.asked_prompts(recipe)[:6]
    with opened(tmp_path / "store", create=True) as store:
        draw_pairs(recipe, (recipe.base, recipe.base), 6, store, Screen())
    count = sum(bool(one.tools) for one in asked)
    said = f"{count} prompts have tools, which raters do not see and exported choices leave out"
    assert said in capsys.readouterr().err


def test_a_drawing_that_was_stopped_goes_on_and_ends_with_the_same_pairs(
    tmp_path: Path, tiny_recipe: Make, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_recipe())
    monkeypatch.setattr(draw, "CHUNK", 4)
    monkeypatch.setattr(draw, "load", lambda name, world: tiny_model)
    with opened(tmp_path / "whole", create=True) as store:
        draw_pairs(recipe, (recipe.base, recipe.base), 10, store, QUIET)
        whole = read_pairs(store)

    sampled, left = draw.sample, []

    def stops(*words: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return sampled(*words)

    monkeypatch.setattr(draw, "sample", stops)
    for calls in (1, 4):
        left[:] = [calls]
        with opened(tmp_path / "parts", create=True) as store, pytest.raises(KeyboardInterrupt):
            draw_pairs(recipe, (recipe.base, recipe.base), 10, store, QUIET)
    left[:] = [1000]
    with opened(tmp_path / "parts") as store:
        draw_pairs(recipe, (recipe.base, recipe.base), 10, store, QUIET)
        assert read_pairs(store) == whole


def test_two_models_answer_each_prompt_once_and_equal_answers_are_left_out(
    tmp_path: Path, tiny_recipe: Make, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_recipe())
    monkeypatch.setattr(draw, "load", lambda name, world: tiny_model)
    monkeypatch.setattr(draw, "TEMPERATURE", 0.0)  # two names of one greedy model: every answer is the same
    with opened(tmp_path, create=True) as store:
        assert draw_pairs(recipe, ("M1", "M2"), 5, store, QUIET) == {"pairs": 0, "equal": 5, "too long": 0}
        assert read_pairs(store) == {}
        assert count_equal(store) == 5


def test_prompts_too_long_for_the_model_are_counted(tmp_path: Path, tiny_recipe: Make, tiny_model: Model) -> None:
    words = " ".join(["word"] * 600)
    rows = [{"prompt": f"{n} {words if n < 2 else ''}", "completion": "x"} for n in range(6)]
    path = rows_file(tmp_path / "rows.jsonl", *rows)
    data = {"train": path, "valid": 0, "test": 0, "near_duplicates": 1}
    recipe = parse_recipe(tiny_recipe({"data": data}))
    with opened(tmp_path, create=True) as store:
        done = draw_pairs(recipe, (recipe.base, recipe.base), 6, store, QUIET)
        assert done["too long"] == 2
        assert done["pairs"] + done["equal"] == 4


# Choices out


def test_exported_choices_are_comparisons_that_read_gives_back(tmp_path: Path, pair: MakePair) -> None:
    turns = (Message(role="system", content="Be kind."), Message(role="user", content="q"))
    tricky = Message(role="assistant", content='[{"role": "user", "content": "not a turn"}]')
    pairs = [
        pair(1, model_a="M1", model_b="M2"),
        pair(2, prompt=turns),
        pair(3, a=tricky),
        *(pair(n) for n in range(4, 8)),
    ]
    gold = pair(9, gold="a")
    with opened(tmp_path, create=True) as store:
        add_pairs(store, [*pairs, gold])
    choose(tmp_path, pairs[0], "left")
    choose(tmp_path, pairs[0], "left", "Bob", left="b")
    choose(tmp_path, pairs[0], "right", repeat=True)
    choose(tmp_path, pairs[1], "right", left="b")
    choose(tmp_path, pairs[2], "left")
    for one, pick in zip(pairs[3:6], ("tie", "both_bad", "skip"), strict=True):
        choose(tmp_path, one, pick)
    choose(tmp_path, gold, "left")
    target = tmp_path / "prefs.jsonl"
    assert export(tmp_path, target, QUIET) == 4
    found = list(read(str(target), DataSpec(train=str(target))))
    assert all(isinstance(row, Comparison) for row in found)
    told = [(row.prompt, row.chosen, row.rejected, row.rater) for row in found if isinstance(row, Comparison)]
    assert told == [
        (pairs[0].prompt, pairs[0].a, pairs[0].b, "Anna"),
        (pairs[0].prompt, pairs[0].b, pairs[0].a, "Bob"),
        (turns, pairs[1].a, pairs[1].b, "Anna"),
        (pairs[2].prompt, tricky, pairs[2].b, "Anna"),
    ]
    assert found[0].extra["chosen_model"] == found[1].extra["rejected_model"] == "M1"
    assert set(found[2].extra) == {"time", "pair"}


def test_nothing_is_exported_where_nothing_was_decided(tmp_path: Path, pair: MakePair) -> None:
    with opened(tmp_path, create=True) as store:
        add_pairs(store, [pair(1)])
    choose(tmp_path, pair(1), "tie")
    with pytest.raises(DataError, match="no pair was decided yet"):
        export(tmp_path, tmp_path / "prefs.jsonl", QUIET)
    assert not (tmp_path / "prefs.jsonl").exists()
    assert summary(tmp_path, 0.95, 0).everybody.ties == 1


# The command


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Make) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe()))
    return path


def test_summary_and_export_of_the_command(
    job: Path, pair: MakePair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [pair(number, model_a="M1", model_b="M2") for number in range(4)]
    with opened(Path("labels/job"), create=True) as store:
        add_pairs(store, pairs)
    for rater in ("Anna", "Bob"):
        for number, one in enumerate(pairs):
            choose(Path("labels/job"), one, "left" if number else "right", rater)
    assert command(monkeypatch, job, "--summary") == 0
    said = capsys.readouterr().out
    for words in (
        "4 of 4 pairs judged",
        "everybody",
        "alpha: 1.00",
        "M1 over M2: preferred in 75% (30 to 95, n = 4)",
        "6 wins",
    ):
        assert words in said, said
    assert command(monkeypatch, job, "--json") == 0
    assert json.loads(capsys.readouterr().out)["duels"][0]["win_rate"]["n"] == 4
    assert command(monkeypatch, job, "--export", "prefs.jsonl") == 0
    assert len(Path("prefs.jsonl").read_text().splitlines()) == 8
    assert "8 rows in prefs.jsonl; left out: 0 ties" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--summary"], "no pairs have been labelled here"),
        (["--export", "x.jsonl"], "no pairs have been labelled here"),
        (["--pairs", "none.jsonl"], "no such file"),
        (["--pairs", "pairs.jsonl", "--rater", " "], "a name has at least one letter"),
    ],
    ids=" ".join,
)
def test_what_the_command_cannot_do_is_one_message(
    words: list[str], says: str, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(Path("pairs.jsonl"), {"prompt": "p", "answer_a": "x", "answer_b": "y"})
    assert command(monkeypatch, job, *words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err
    assert not Path("x.jsonl").exists()


def test_a_port_in_use_is_one_message(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file(Path("pairs.jsonl"), {"prompt": "p", "answer_a": "x", "answer_b": "y"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command(monkeypatch, job, "--pairs", "pairs.jsonl", "--port", port) == 2
    assert f"port {port} is in use" in capsys.readouterr().err


def test_an_interrupted_server_ends_well_and_says_where_the_choices_are(
    job: Path, server: Callable[..., Any], tmp_path: Path
) -> None:
    rows_file(tmp_path / "pairs.jsonl", {"prompt": "p", "answer_a": "x", "answer_b": "y"})
    one = server(job.name, "--pairs", "pairs.jsonl")
    with urllib.request.urlopen(f"{one.start()}/api/about") as response:
        assert json.load(response) == {"name": "job", "rater": ""}
    code, said = one.interrupt()
    assert (code, said.strip()) == (0, "0 choices in labels/job")
