"""The user's reward function may throw, hang, print or die: that answer has no score, and the others have theirs."""

from __future__ import annotations

import math
import os
import selectors
import textwrap
from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.evaluate.own import load_function, own_grade
from tunesmith.evaluate.rewarding import FIRST_PROBLEMS, FunctionReward
from tunesmith.types import Item, Message

SLOWEST = 0.3


def items(count: int) -> list[Item]:
    turn = Message(role="user", content="Wie groß? ✂", tool_calls=({"name": "f", "arguments": {"x": 1.5}},))
    return [
        Item(prompt=(turn,), reference=f"r{n}", id=f"row{n}", choices=("a", "b"), extra={"weights": [1, 2.5, None]})
        for n in range(count)
    ]


def reward(folder: Path, body: str, name: str = "own.py:score", seconds: float = SLOWEST) -> FunctionReward:
    (folder / "own.py").write_text(textwrap.dedent(body), encoding="utf-8")
    return FunctionReward(name, folder, seconds)


def ends(process: int, within_seconds: float) -> bool:
    """Whether a process that may be nobody's child ends: a killed one does when the system next looks at it."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    with os.fdopen(handle, "rb"), selectors.DefaultSelector() as ready:
        ready.register(handle, selectors.EVENT_READ)
        return bool(ready.select(within_seconds))


def test_scores_come_in_the_order_of_the_answers(tmp_path: Path) -> None:
    body = """
        def score(answer, item):
            return len(answer) / 3 + int(item.reference[1:])
    """
    answers = ["", "é", "ab\n", 'quoted " \\ and \u2028', "x" * 300_000]
    with reward(tmp_path, body, seconds=10) as grade:
        assert grade(items(5), answers) == [len(answer) / 3 + n for n, answer in enumerate(answers)]
        assert grade([], []) == []
        assert not grade.failures
        assert not grade.problems


def test_the_function_gets_the_item_as_it_was(tmp_path: Path) -> None:
    (item,) = items(1)
    body = f"""
        from tunesmith.types import Item, Message

        def score(answer, item):
            return item == {item!r}
    """
    with reward(tmp_path, body) as grade:
        assert grade([item], ["a"]) == [1.0]


def test_answers_that_a_function_fails_on_have_no_score_and_are_counted(tmp_path: Path) -> None:
    body = """
        def score(answer, item):
            results = {"nan": float("nan"), "text": "1", "none": None, "huge": float("inf"), "good": 0.25}
            return results[answer]
    """
    with reward(tmp_path, body, seconds=10) as grade:
        scores = grade(items(8), ["good", "nan", "text", "none", "huge", "odd", "worse", "good"])
    assert scores[0] == scores[7] == 0.25
    assert all(map(math.isnan, scores[1:7]))
    assert grade.failures == {"returned no finite number": 4, "raised KeyError": 2}
    assert len(grade.problems) == FIRST_PROBLEMS
    assert grade.problems[0] == "own.py:score, item row1: the function returned nan"
    assert grade.problems[4] == "own.py:score, item row5: the function fails: KeyError: 'odd' (line 4)"


def test_a_hanging_call_is_cut_off_and_the_next_answers_are_scored(tmp_path: Path) -> None:
    body = """
        def score(answer, item):
            while answer == "hang":
                pass
            return 1
    """
    with reward(tmp_path, body) as grade:
        scores = grade(items(4), ["a", "hang", "b", "c"])
    assert math.isnan(scores[1])
    assert [scores[0], *scores[2:]] == [1.0, 1.0, 1.0]
    assert grade.failures == {"took longer than 0.3 seconds": 1}
    assert grade.problems == ["own.py:score, item row1: the function took longer than 0.3 seconds"]


def test_what_a_hanging_call_started_is_ended_with_it(tmp_path: Path) -> None:
    body = """
        import pathlib
        import subprocess

        def score(answer, item):
            child = subprocess.Popen(["sleep", "600"])
            pathlib.Path(item.extra["file"]).write_text(str(child.pid))
            child.wait()
    """
    left = tmp_path / "pid"
    item = Item(prompt=(), reference="", id="row0", extra={"file": str(left)})
    with reward(tmp_path, body) as grade:
        assert math.isnan(grade([item], ["a"])[0])
    assert ends(int(left.read_text()), within_seconds=60)


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_function_that_ends_its_process_costs_one_score(end: str, tmp_path: Path) -> None:
    body = f"""
        import os, sys

        def score(answer, item):
            if answer == "end":
                {end}
            return 2
    """
    with reward(tmp_path, body, seconds=10) as grade:
        scores = grade(items(3), ["a", "end", "b"])
    assert scores[::2] == [2.0, 2.0]
    assert math.isnan(scores[1])
    assert grade.failures == {"ended its process": 1}


def test_a_process_that_was_killed_between_two_answers_is_started_again(tmp_path: Path) -> None:
    body = """
        import os, threading

        def score(answer, item):
            if answer == "later":
                threading.Timer(0, os._exit, [0]).start()
            return 1
    """
    with reward(tmp_path, body, seconds=10) as grade:
        grade(items(1), ["later"])
        scores = grade(items(4), ["a"] * 4)
    assert sum(map(math.isnan, scores)) <= 1
    assert scores[1:] == [1.0, 1.0, 1.0]


def test_what_the_function_prints_or_reads_disturbs_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
        import os, subprocess, sys

        print("loading")

        def score(answer, item):
            print('{"score": 99}')
            sys.__stdout__.write('{"score": 98}\\n')
            sys.__stdout__.flush()
            os.write(1, b'{"score": 97}\\n')
            subprocess.run(["echo", '{"score": 96}'], check=True)
            return len(sys.stdin.read())
    """
    with reward(tmp_path, body, seconds=10) as grade:
        assert grade(items(2), ["a", "b"]) == [0.0, 0.0]
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line for line in shown.err.splitlines() if "9" in line] == 2 * [
        f'{{"score": {n}}}' for n in (99, 98, 97, 96)
    ]


BROKEN = {
    "absent": (None, "own.py:score"),
    "no function": ("def scores(answer, item): return 1", "own.py:score"),
    "syntax": ("def score(:\n", "own.py:score"),
    "raises": ("x = 1\nraise KeyError('settings')", "own.py:score"),
    "exits": ("import sys\nsys.exit(1)", "own.py:score"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_file_that_does_not_load_is_refused_before_training_as_for_a_metric(case: str, tmp_path: Path) -> None:
    body, name = BROKEN[case]
    if body is not None:
        (tmp_path / "own.py").write_text(body, encoding="utf-8")
    with pytest.raises(RecipeError) as wanted:
        load_function(name, tmp_path)
    with pytest.raises(RecipeError) as found:
        FunctionReward(name, tmp_path, SLOWEST)
    assert str(found.value) == str(wanted.value)


def test_a_file_that_ends_its_process_while_loading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="own.py:score: the file ends its process while it is loaded"):
        reward(tmp_path, "import os\nos._exit(0)")


def test_closing_leaves_no_process_behind(tmp_path: Path) -> None:
    with reward(tmp_path, "import os\ndef score(answer, item): return os.getpid()", seconds=10) as grade:
        (process,) = grade(items(1), ["a"])
        assert process != os.getpid()
    assert not Path(f"/proc/{int(process)}").exists()
    grade.close()


def test_a_second_parameter_called_reference_gets_the_reference_alone(tmp_path: Path) -> None:
    text = """
    def equal(answer, reference):
        return answer == reference

    def fails(answer, reference):
        return 1 / 0
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(text), encoding="utf-8")
    item = Item(prompt=(), reference="B", id="one")
    assert own_grade("own.py:equal", tmp_path)([item, item], ["B", "C"]) == [1.0, 0.0]
    with pytest.raises(RecipeError, match="line 6"):
        own_grade("own.py:fails", tmp_path)([item], ["B"])
