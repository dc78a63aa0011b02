"""From a teacher's answers to a judged student, on the tiny model and a real server that speaks chat completions."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith import cli
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.folder import RunFolder, read_json, read_jsonl, write_jsonl
from tunesmith.model.endpoint import Question, Reply
from tunesmith.pipeline.distill import distill, plan_distillation
from tunesmith.pipeline.run import run
from tunesmith.pipeline.teacher import Checks, checks_of, collect, read_answers, why_not
from tunesmith.recipe import Recipe, parse_recipe
from tunesmith.screen import Screen
from tunesmith.types import Conversation, Message
from tunesmith.world import World

Make = Callable[..., dict[str, Any]]
KEY = "sk-a-secret-that-nobody-may-see"
QUIET = Screen(quiet=True)


@pytest.fixture
def inputs(tmp_path: Path, tiny_rows: Path) -> Path:
    """The prompts of the tiny rows alone."""
    path = tmp_path / "inputs.jsonl"
    write_jsonl(path, [{"prompt": row["prompt"]} for row in read_jsonl(tiny_rows)])
    return path


@pytest.fixture
def raw(tmp_path: Path, tiny_recipe: Make, chat_server: Any, inputs: Path) -> Make:
    """Makes recipes whose teacher is the server."""

    def make(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        return tiny_recipe(
            {
                "out": str(tmp_path / "run"),
                "data.train": str(inputs),
                "train.max_steps": 2,
                "task.teacher.by": chat_server.url,
                "task.teacher.model": "big",
                **(changes or {}),
            }
        )

    return make


def distilled(recipe: Recipe) -> RunFolder:
    return distill(plan_distillation(recipe, QUIET), World(), QUIET)


def test_plain_inputs_become_a_student_judged_against_its_teacher(raw: Make, chat_server: Any, tmp_path: Path) -> None:
    recipe = parse_recipe(raw({"task.teacher.price": [1.0, 2.0]}))
    folder = distilled(recipe)
    found = read_json(folder.results)
    facts = found["distill"]
    assert found["best_prompted"] == "teacher"
    assert found["arms"]["teacher"]["metrics"]["exact_match"]["value"] == 1.0  # its own answers are the references
    assert facts["judged_by"] == "the teacher's answers"
    assert facts["dropped"] == {}
    assert facts["spent"]["cost"] == pytest.approx(len(chat_server.asked) * (50 * 1.0 + 3 * 2.0) / 1e6)
    assert facts["equivalence"]["margin"] == 0.05
    assert facts["equivalence"]["difference"]["level"] == pytest.approx(0.9)
    assert found["verdict"]["decision"] == "do not ship"  # a random model of two steps
    assert found["savings"]["prompt_tokens_saved_per_request"] > 0
    lines = read_jsonl(folder.answers("teacher"))
    assert all(line["answer"] == line["reference"] == line["reference"].upper() for line in lines)
    page = folder.report.read_text(encoding="utf-8")
    assert "collecting answers" in page
    assert "That is another model: what its tokens cost is not known" in page
    assert "break-even not known: the teacher is another model" in page
    asked = len(chat_server.asked)
    assert asked == len(set(chat_server.asked))
    assert chat_server.bodies[0]["messages"][0] == {"role": "system", "content": "Give the upper case."}

    assert distilled(recipe).results == folder.results  # finished: nothing is asked or trained again
    retrained = parse_recipe(
        raw({"out": str(tmp_path / "run"), "train.max_steps": 2, "task.teacher.price": [1.0, 2.0]})
    )
    assert plan_distillation(retrained, QUIET).requests == 0
    assert len(chat_server.asked) == asked


def test_references_judge_where_there_are_some(raw: Make, chat_server: Any, tiny_rows: Path) -> None:
    chat_server.say = lambda question: question.rpartition(": ")[2].upper() if "a" in question[16:] else "no idea"
    folder = distilled(parse_recipe(raw({"data.train": str(tiny_rows)})))
    found = read_json(folder.results)
    share = found["arms"]["teacher"]["metrics"]["exact_match"]["value"]
    assert 0 < share < 1
    assert found["distill"]["judged_by"] == "references"
    wrong = found["distill"]["dropped"]["wrong by exact_match"]
    ledger = read_jsonl(Path(f"{folder.path}-teacher") / "ledger.jsonl")
    assert sum(entry["reason"] == "wrong by exact_match" for entry in ledger) == wrong
    for name in ("train", "valid"):
        rows = read_jsonl(Path(f"{folder.path}-teacher") / f"{name}.jsonl")
        assert all(row["completion"] != "no idea" for row in rows)


def test_an_answer_that_the_metric_cannot_read_is_left_out(raw: Make, chat_server: Any) -> None:
    chat_server.say = lambda question: str(len(question)) if "a" in question[16:] else "no idea"
    folder = distilled(parse_recipe(raw({"task.metric": "numeric_match"})))
    assert read_json(folder.results)["distill"]["dropped"]["numeric_match cannot read it"] > 0
    for name in ("train", "valid", "test"):
        rows = read_jsonl(Path(f"{folder.path}-teacher") / f"{name}.jsonl")
        assert all(row["completion"] != "no idea" for row in rows)


def test_held_out_answers_that_a_further_metric_cannot_grade_are_left_out(raw: Make, chat_server: Any) -> None:
    chat_server.say = lambda question: str(len(question)) if "a" in question[16:] else "no idea"
    folder = distilled(parse_recipe(raw({"task.metric": "rouge_l", "task.also": ["numeric_match"]})))
    assert read_json(folder.results)["distill"]["dropped"]["task.also cannot grade it"] > 0
    rows = {name: read_jsonl(Path(f"{folder.path}-teacher") / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert any(row["completion"] == "no idea" for row in rows["train"])
    assert all(row["completion"] != "no idea" for row in (*rows["valid"], *rows["test"]))
    ledger = read_jsonl(Path(f"{folder.path}-teacher") / "ledger.jsonl")
    told = [entry["detail"] for entry in ledger if entry["reason"] == "task.also cannot grade it"]
    assert set(told) == {"the reference 'no idea' holds no number"}


def test_a_reference_that_the_metric_cannot_read_is_told_before_the_teacher_is_asked(
    raw: Make, tiny_rows: Path
) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: the reference '[A-H]+' holds no number"):
        plan_distillation(parse_recipe(raw({"data.train": str(tiny_rows), "task.metric": "numeric_match"})), QUIET)


def test_a_model_here_can_teach_with_a_long_prompt(tiny_recipe: Make, inputs: Path, tmp_path: Path) -> None:
    raw = tiny_recipe({"out": str(tmp_path / "run"), "data.train": str(inputs), "train.max_steps": 2})
    write_jsonl(tmp_path / "shots.jsonl", [{"prompt": "Upper case of: cab", "completion": "CAB"}] * 3)
    raw["task"]["teacher"] = {"by": raw["base"], "shots": str(tmp_path / "shots.jsonl"), "agreement": 1}
    plan = plan_distillation(parse_recipe(raw), QUIET)
    assert not plan.costs_money
    ask = [question for part in plan.asked.values() for _, questions in part for question in questions]
    assert [message.role for message in ask[0].messages] == ["system", *["user", "assistant"] * 3, "user"]
    with pytest.raises(DataError, match="did not end"):  # a random model never stops
        distill(plan, World(), QUIET)
    answers = read_answers(tmp_path / "run-teacher" / "answers.jsonl")
    assert len(answers) == len(ask)
    assert not (tmp_path / "run").exists()


def row(prompt: str = "two and two?", completion: str = "") -> Conversation:
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    return Conversation(messages=messages, id="r", source="f:1")


@pytest.mark.parametrize(
    ("reason", "replies", "reference"),
    [
        ("", [Reply(text=" Four. ")], ""),
        ("", [Reply(text="four"), Reply(text="Four!")], ""),
        ("answers disagree", [Reply(text="four"), Reply(text="five")], ""),
        ("the teacher refused", [Reply(text="", refusal="400")], ""),
        ("the answer did not end", [Reply(text="four", stop="length")], ""),
        ("empty answer", [Reply(text="  ")], ""),
        ("", [Reply(text="four")], "four"),
        ("wrong by exact_match", [Reply(text="five")], "four"),
        ("cannot be trained", [Reply(text="four<|im_end|>five")], ""),
    ],
)
def test_an_answer_is_left_out_for_a_reason(
    tiny_recipe: Make, tiny_model: Any, reason: str, replies: list[Reply], reference: str
) -> None:
    checks: Checks = checks_of(parse_recipe(tiny_recipe()), Path())
    assert why_not(row(completion=reference), replies, checks, tiny_model.vocabulary)[0] == reason


def test_numbers_agree_as_numbers_and_references_can_be_left_alone(tiny_recipe: Make, tiny_model: Any) -> None:
    raw = tiny_recipe({"task.metric": "numeric_match", "task.teacher.check_references": False})
    checks = checks_of(parse_recipe(raw), Path())
    same, other = [Reply(text="so 4"), Reply(text="It is 4.0")], [Reply(text="so 4"), Reply(text="none")]
    assert why_not(row(completion="5"), same, checks, tiny_model.vocabulary) == ("", "")
    assert why_not(row(), other, checks, tiny_model.vocabulary)[0] == "answers disagree"


def test_samples_that_must_agree_are_drawn_warm_and_told_apart(raw: Make, chat_server: Any) -> None:
    plan = plan_distillation(parse_recipe(raw({"task.teacher.agreement": 3})), QUIET)
    trained = [question for part in ("train", "valid") for _, three in plan.asked[part] for question in three]
    tested = [question for _, one in plan.asked["test"] for question in one]
    assert {question.temperature for question in trained} == {0.7}
    assert {question.temperature for question in tested} == {0.0}
    assert (
        len({question.id for question in trained})
        == len(trained)
        == 3 * sum(len(plan.asked[name]) for name in ("train", "valid"))
    )


def test_a_torn_line_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ask = [Question(id=f"q{n}", messages=(), temperature=0.0, max_new_tokens=1) for n in range(4)]
    seen: list[str] = []

    def answer(questions: Any, keep: Any) -> None:
        for question in questions:
            seen.append(question.id)
            keep(question, Reply(text=question.id))

    collect(ask[:3], path, answer, QUIET)
    path.write_bytes(path.read_bytes()[:-5])
    found = collect([*ask, ask[0]], path, answer, QUIET)
    assert seen == ["q0", "q1", "q2", "q2", "q3"]
    assert found == read_answers(path) == {f"q{n}": Reply(text=f"q{n}") for n in range(4)}


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_asks_nothing_twice(raw: Make, chat_server: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw({"task.teacher.parallel": 2})))
    store = tmp_path / "run-teacher" / "answers.jsonl"
    command = [sys.executable, "-m", "tunesmith.cli", "distill", str(recipe)]
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OPENAI_API_KEY": KEY}
    killed: list[subprocess.Popen[bytes]] = []

    def before(question: str) -> None:
        if len(chat_server.asked) == 25:
            killed[0].send_signal(signal.SIGKILL)
            killed[0].wait()

    chat_server.before = before
    killed.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    killed[0].communicate()
    assert killed[0].returncode == -signal.SIGKILL
    stored, asked = read_answers(store), list(chat_server.asked)
    assert len(stored) >= 20
    chat_server.before = lambda question: None
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = chat_server.asked[len(asked) :]
    assert len(again) == len(set(again))
    # Only what was under way when it was killed is asked a second time.
    assert len(set(again) & set(asked)) == len(asked) - len(stored) <= 3
    assert {reply.text for reply in stored.values()} <= {reply.text for reply in read_answers(store).values()}
    assert len(read_answers(store)) == len(set(chat_server.asked))
    assert set(chat_server.keys) == {f"Bearer {KEY}"}
    said = done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in said
    assert len(files) > 10
    assert all(KEY.encode() not in path.read_bytes() for path in files)


def test_a_teacher_that_refuses_everything_stops_early(raw: Make, chat_server: Any) -> None:
    chat_server.faults += [(400, {}, {"error": {"message": "temperature is not supported"}})] * 200
    with pytest.raises(ModelError, match="refuses everything .*temperature is not supported"):
        distilled(parse_recipe(raw()))
    assert len(chat_server.asked) < 20


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.teacher.by": ""}, "there is no teacher"),
        ({"task.teacher.model": ""}, "serves models by name"),
        ({"task.teacher.by": "http://127.0.0.1:1/"}, "does not end in /v1"),
        ({"task.teacher.agreement": 2, "task.teacher.temperature": 0}, "always agree"),
        ({"method": "dpo"}, "method dpo has no use"),
        ({"task.metric": "completion_loss"}, "completion_loss cannot grade"),
        ({"data.test": 0}, "test rows"),
        ({"task.also": ["rouge"]}, "task.also: unknown metric 'rouge'"),
        ({"task.also": ["own.py:f"]}, "own.py:f: no such file"),
        ({"evaluate.retention": "gone.jsonl"}, "gone.jsonl: no such file"),
    ],
)
def test_a_recipe_that_cannot_be_distilled_is_told(raw: Make, changes: dict[str, Any], told: str) -> None:
    with pytest.raises((RecipeError, DataError), match=told):
        plan_distillation(parse_recipe(raw(changes)), QUIET)


def test_a_teacher_that_is_the_student_without_a_prompt_is_refused(tiny_recipe: Make) -> None:
    raw = tiny_recipe({"task.instructions": ""})
    raw["task"]["teacher"] = raw["base"]
    with pytest.raises(RecipeError, match="the student without a prompt"):
        plan_distillation(parse_recipe(raw), QUIET)


def test_no_inputs_and_rows_that_ask_nothing_are_told(raw: Make, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        plan_distillation(parse_recipe(raw({"data.train": str(tmp_path / "none.jsonl")})), QUIET)
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"{n} {chr(97 + n % 26) * 9} alone"} for n in range(40)])
    with pytest.raises(DataError, match=r"text\.jsonl:\d+: the row is no input"):
        plan_distillation(parse_recipe(raw({"data.train": str(tmp_path / "text.jsonl")})), QUIET)


@pytest.mark.parametrize("where", ["tools", "calls"])
def test_tools_and_earlier_calls_that_a_teacher_would_not_see_are_refused(
    where: str, raw: Make, tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns = [*asked, {"role": "tool", "content": "42"}] if where == "calls" else asked[:1]
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if where == "tools" else {}
    answer = {"role": "assistant", "content": "y"}
    write_jsonl(
        tmp_path / "rows.jsonl",
        [{"messages": [{"role": "system", "content": str(n)}, *turns, answer], **tools} for n in range(20)],
    )
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: a teacher is not sent tools"):
        plan_distillation(parse_recipe(raw({"data.train": str(tmp_path / "rows.jsonl")})), QUIET)


def test_a_teacher_that_does_not_run_is_told_at_once(raw: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match=r"(?s)connection refused.*Start the server or mend task\.teacher\.by"):
        distilled(parse_recipe(raw({"task.teacher.by": nobody})))


def test_inputs_may_have_other_columns_and_the_test_file_references(raw: Make, tmp_path: Path, tiny_rows: Path) -> None:
    rows = read_jsonl(tiny_rows)
    write_jsonl(tmp_path / "in.jsonl", [{"id": n, "prompt": row["prompt"]} for n, row in enumerate(rows[:60])])
    write_jsonl(tmp_path / "test.jsonl", rows[60:])
    files = {"data.train": str(tmp_path / "in.jsonl"), "data.test": str(tmp_path / "test.jsonl")}
    plan = plan_distillation(parse_recipe(raw(files)), QUIET)
    assert all(not row.completion and "id" in row.extra for row, _ in plan.asked["train"])
    assert all(row.completion for row, _ in plan.asked["test"])
    assert plan.requests == len(plan.asked["train"]) + 8 + 20  # evaluate.valid_rows, evaluate.rows


def test_a_key_that_no_header_can_carry_is_told_without_it(raw: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "schl\u00fcssel")
    with pytest.raises(RecipeError, match="no header can carry") as caught:
        plan_distillation(parse_recipe(raw()), QUIET)
    assert "schl" not in str(caught.value)


def test_run_points_to_distill(raw: Make) -> None:
    with pytest.raises(RecipeError, match="tunesmith distill"):
        run(parse_recipe(raw()))


def test_money_is_not_spent_without_a_yes(
    raw: Make, chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw({"task.teacher.price": [0.15, 0.6], "task.teacher.requests_per_minute": 500})))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "distill", str(recipe)])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert "--yes" in said.err
    assert "requests of about" in said.err
    assert "at most" in said.err
    assert "minutes at 500 requests a minute" in said.err
    assert chat_server.asked == []
    assert said.out == ""
