"""Fine-tuning jobs as the official client asks for them: real uploads, real workers, real answers."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import openai
import pytest
import torch
import yaml
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tunesmith.data.read import read
from tunesmith.errors import FolderError
from tunesmith.folder import RunFolder, write_json, write_jsonl
from tunesmith.recipe import DataSpec
from tunesmith.serve.jobs import FILE_NAME, add_job, find_job, list_events, move, open_store
from tunesmith.serve.room import fits, has_room
from tunesmith.serve.tuning import held
from tunesmith.serve.workers import Watch, problem_in
from tunesmith.types import Comparison

if TYPE_CHECKING:
    from conftest import Serving

JOBS = "/v1/fine_tuning/jobs"
SMALL: dict[str, Any] = {"max_steps": 3, "forgetting": False, "shots": 0, "max_new_tokens": 4, "rank": 2, "test": 0.2}
WORDS = sorted({"".join(random.Random(seed).choices("abcdefgh", k=4)) for seed in range(48)})


def chat_row(word: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Upper case of: {word}"}, {"role": "assistant", "content": word.upper()}]
    return {"messages": turns}


def choice_row(word: str) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Upper case of: {word}"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": word.upper()}],
        "non_preferred_output": [{"role": "assistant", "content": word}],
    }


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHATS, CHOICES = jsonl([chat_row(word) for word in WORDS[:40]]), jsonl([choice_row(word) for word in WORDS[:40]])


def question_row(word: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Upper case of: {word}"}], "answer": word.upper()}


def reinforced(grader: dict[str, Any], **hyperparameters: Any) -> dict[str, Any]:
    return {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}}


QUESTIONS = jsonl([question_row(word) for word in WORDS[:40]])
NEAR = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "fuzzy_match",
}
PYTHON = {
    "type": "python",
    "name": "own",
    "source": "def grade(sample, item):\n    return len(set(sample['output_text']) & set(item['answer'])) / 4\n",
}


@pytest.fixture
def client(shop: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{shop.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


@pytest.fixture
def http(shop: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shop.url, timeout=60) as one:
        yield one


def upload(client: OpenAI, content: bytes = CHATS, name: str = "rows.jsonl", **more: Any) -> str:
    return client.files.create(file=(name, content), purpose="fine-tune", **more).id


def create(
    client: OpenAI, shop: Serving, file: str, small: dict[str, Any] | None = None, **asked: Any
) -> FineTuningJob:
    own = {"tunesmith": {key: value for key, value in {**SMALL, **(small or {})}.items() if value is not None}}
    model = shop.hall.base_name
    return client.fine_tuning.jobs.create(model=model, training_file=file, extra_body=own, **asked)


def job_when(client: OpenAI, name: str, *statuses: str) -> FineTuningJob:
    """The job, once it has one of these statuses."""
    end, pause = time.monotonic() + 120, threading.Event()
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(name)
        if job.status in statuses:
            return job
        assert job.status not in ("succeeded", "failed", "cancelled"), job
        pause.wait(0.05)
    raise AssertionError(f"never {statuses}: {client.fine_tuning.jobs.retrieve(name)}")


def messages(client: OpenAI, name: str) -> list[str]:
    """A job's events, the oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(name, limit=100)][::-1]


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# Files


def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(client: OpenAI) -> None:
    first, second = (client.files.create(file=("mine.jsonl", CHATS), purpose="fine-tune") for _ in range(2))
    assert first.id != second.id
    assert (first.bytes, first.filename, first.purpose) == (len(CHATS), "mine.jsonl", "fine-tune")
    assert client.files.content(first.id).read() == CHATS
    assert client.files.retrieve(first.id) == first
    assert client.files.wait_for_processing(first.id) == first
    known = [file.id for file in client.files.list(limit=1)]  # the client turns the pages
    assert known[:2] == [second.id, first.id]
    assert [file.id for file in client.files.list(order="asc", purpose="fine-tune")][-1] == second.id
    assert client.files.delete(first.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    assert client.files.content(second.id).read() == CHATS


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "mine.jsonl: the file is empty"),
        (b"PK\x03\x04\0\0", "mine.jsonl:1: the line holds a NUL byte"),
        (b"prompt,completion\na,b\n", "mine.jsonl:1: not valid JSON"),
        (b"[1, 2]\n", "mine.jsonl:1: the row is not an object"),
        (b"\xff\xfe{\0}\0", "mine.jsonl:1: the file is UTF-16"),
    ],
)
def test_what_is_not_jsonl_is_refused_and_not_kept(content: bytes, why: str, client: OpenAI, shop: Serving) -> None:
    before = len(list(client.files.list()))
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, content, "../x/mine.jsonl")
    assert why in str(caught.value)
    assert caught.value.code == "invalid_jsonl"
    assert len(list(client.files.list())) == before


def test_too_large_a_file_is_413_whether_its_size_is_declared_or_not(client: OpenAI, http: httpx.Client) -> None:
    large = CHATS * 100
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, large)
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert "larger than 100000 bytes" in str(caught.value)
    request = http.build_request("POST", "/v1/files", files={"file": ("x.jsonl", large)}, data={"purpose": "fine-tune"})
    body = request.read()
    parts = iter([body[:50000], body[50000:200000], body[200000:]])
    kind = {"content-type": request.headers["content-type"]}
    assert http.post("/v1/files", content=parts, headers=kind).status_code == 413
    assert upload(client, CHATS)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after[seconds]"),
    ],
)
def test_a_form_with_a_wish_that_is_not_honoured_is_refused(
    fields: dict[str, str], param: str, http: httpx.Client
) -> None:
    refused = http.post("/v1/files", files={"file": ("x.jsonl", CHATS)}, data=fields)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)


FORM = "multipart/form-data; boundary=b"
CUT = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n{"a"'
NO_FILE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "application/json", 400),
        (b"x", "multipart/form-data", 400),
        (b"nothing of the kind", FORM, 400),
        (CUT, FORM, 400),
        (NO_FILE, FORM, 400),
        (b"x", "text/plain", 415),
    ],
)
def test_a_body_that_is_no_whole_form_is_refused(body: bytes, kind: str, status: int, http: httpx.Client) -> None:
    assert http.post("/v1/files", content=body, headers={"content-type": kind}).status_code == status


def test_an_upload_that_is_broken_off_is_no_failure_of_the_server(shop: Serving, http: httpx.Client) -> None:
    def uploads() -> list[str]:
        found = re.findall(
            r'requests_total{method="POST",route="/v1/files",status="(.*)"} (.*)', http.get("/metrics").text
        )
        return [status for status, number in found for _ in range(int(float(number)))]

    before, end = uploads(), time.monotonic() + 60
    lines = ["POST /v1/files HTTP/1.1", "Host: localhost", f"Content-Type: {FORM}", "Content-Length: 5000", "", ""]
    with socket.create_connection(("127.0.0.1", int(shop.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall("\r\n".join(lines).encode() + CUT)
    while len(after := uploads()) == len(before):
        assert time.monotonic() < end
    assert sorted(after) == sorted([*before, "400"])


def test_one_key_makes_one_file_and_one_job(client: OpenAI, shop: Serving) -> None:
    again = {"extra_headers": {"Idempotency-Key": "file-1"}}
    file = upload(client, **again)
    assert upload(client, **again) == file
    with pytest.raises(openai.ConflictError):
        upload(client, CHOICES, **again)
    key = {"Idempotency-Key": "job-1"}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: create(client, shop, file, seed=1, extra_headers=key).id, range(8)))
    assert len(set(found)) == 1
    with pytest.raises(openai.ConflictError) as caught:
        create(client, shop, file, seed=2, extra_headers=key)
    assert caught.value.code == "idempotency_key_reused"
    assert [job.id for job in client.fine_tuning.jobs.list()].count(found[0]) == 1
    assert client.fine_tuning.jobs.cancel(found[0]).status == "cancelled"


# Jobs


@pytest.mark.slow
def test_a_supervised_job_ends_in_a_model_that_answers(client: OpenAI, shop: Serving, http: httpx.Client) -> None:
    held_out = upload(client, jsonl([chat_row(word) for word in WORDS[40:]]), "held out.jsonl")
    asked: dict[str, Any] = {
        "validation_file": held_out,
        "suffix": "upper",
        "seed": 7,
        "metadata": {"team": "one"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2.0}}},
    }
    file = upload(client, CHATS, "my rows.jsonl")
    job = create(client, shop, file, **asked)
    assert (job.status, job.fine_tuned_model, job.finished_at) == ("validating_files", None, None)
    client.files.delete(file)  # the job has its own
    job = job_when(client, job.id, "succeeded")

    assert job.fine_tuned_model == f"ft:{shop.hall.base_name}:tunesmith:upper:{job.id[-8:]}"
    assert (job.seed, job.metadata, job.validation_file, job.error) == (7, {"team": "one"}, held_out, None)
    assert job.trained_tokens
    assert job.finished_at
    settled = job.hyperparameters
    assert isinstance(settled.n_epochs, float | int)
    assert isinstance(settled.batch_size, int)
    assert settled.learning_rate_multiplier == 2.0
    turns: Any = [{"role": "user", "content": "Upper case of: abcd"}]
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=turns, max_tokens=4)
    assert answer.model == job.fine_tuned_model
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model

    ours = job.tunesmith  # type: ignore[attr-defined]
    assert ours["verdict"]["decision"] in ("ship", "do not ship", "not shown")
    recipe = yaml.safe_load((Path(ours["run"]) / "recipe.yaml").read_text())
    assert recipe["train"]["learning_rate"] == pytest.approx(2 * 0.0073)
    report = http.get(ours["report"])
    assert "Tunesmith report" in report.text
    assert "default-src 'none'; style-src" in report.headers["content-security-policy"]

    said = messages(client, job.id)
    assert said[0] == f"Created fine-tuning job: {job.id}"
    assert said[-1] == "The job has successfully completed"
    steps = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    losses = {step["step"]: step["train_loss"] for step in steps if "train_loss" in step}  # type: ignore[index,operator]
    assert sorted(losses) == [1, 2, 3]
    (kept,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert kept.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert kept.metrics.train_loss == losses[kept.step_number]
    table = client.files.content(job.result_files[0]).read().decode().splitlines()
    assert table[0] == "step,train_loss,valid_loss"
    assert [line.split(",")[0] for line in table[1:]] == ["1", "2", "3"]
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "one"})] == [job.id]
    progress = http.get(f"{JOBS}/{job.id}/progress").json()
    assert len(progress["loss"]) == progress["total_steps"] == 3
    assert "Verdict" in progress["log"]
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="the job is succeeded"):
            call(job.id)


@pytest.mark.slow
def test_a_dpo_job_is_paused_resumed_and_ends_in_a_model_that_answers(client: OpenAI, shop: Serving) -> None:
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 50, "batch_size": 4}}}
    job = create(client, shop, upload(client, CHOICES), {"max_steps": 400, "shots": None}, method=method)
    waiting = create(client, shop, upload(client))  # one at a time: it waits
    end, pause = time.monotonic() + 120, threading.Event()
    while not any("training loss" in message for message in messages(client, job.id)):
        assert client.fine_tuning.jobs.retrieve(job.id).error is None
        assert time.monotonic() < end, messages(client, job.id)
        pause.wait(0.02)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    job = job_when(client, job.id, "succeeded")
    assert job.fine_tuned_model
    turns: Any = [{"role": "user", "content": "Upper case of: abcd"}]
    assert client.chat.completions.create(model=job.fine_tuned_model, messages=turns, max_tokens=4).choices
    said = messages(client, job.id)
    steps = [message.split(":")[0] for message in said if "training loss" in message]
    assert steps == [f"Step {n}/400" for n in range(1, 401)]  # none lost, none twice
    assert [said.count(what) for what in ("Fine-tuning job paused", "Fine-tuning job resumed")] == [1, 1]
    log = Path(job.tunesmith["run"]).parent / "log.txt"  # type: ignore[attr-defined]
    assert "stopping after this step" in log.read_text() or "resumed" in log.read_text()
    assert client.fine_tuning.jobs.retrieve(waiting.id).status == "cancelled"


def test_a_bad_row_fails_the_job_with_its_file_line_and_reason(client: OpenAI, shop: Serving) -> None:
    rows = CHATS.splitlines(keepends=True)
    rows[4] = b'{"messages": [{"role": "user", "content": "and then?"}]}\n'
    training = create(client, shop, upload(client, b"".join(rows), "tickets.jsonl"))
    job = job_when(client, training.id, "failed")
    assert job.error
    assert (job.error.code, job.error.param) == ("invalid_file", "training_file")
    assert "training/tickets.jsonl:5: the last message is from 'user', not the assistant" in job.error.message
    assert str(Path(job.tunesmith["run"]).parent) not in job.error.message  # type: ignore[attr-defined]
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    held_out = create(client, shop, upload(client), validation_file=upload(client, CHOICES, "v.jsonl"))
    error = job_when(client, held_out.id, "failed").error
    assert error
    assert (error.param, "validation/v.jsonl:1: not a row for method supervised" in error.message) == (
        "validation_file",
        True,
    )


@pytest.mark.parametrize(
    ("log", "code", "kind", "message"),
    [
        ("Data\nerror rows.jsonl:3: too long\nCut it.\n", 2, "run_failed", "rows.jsonl:3: too long Cut it."),
        ("error old\nTraceback\nMemoryError: no\n", 1, "run_failed", "old Traceback MemoryError: no"),
        ("Traceback\nMemoryError: no\n", 1, "run_failed", "the worker ended with code 1: MemoryError: no"),
        ("", 1, "run_failed", "the worker ended with code 1: it said nothing"),
        ("step 1", -9, "worker_killed", "the worker was ended by SIGKILL"),
        ("stopped after step 3 of 9\nRun it again.", 130, "worker_killed", "the worker was ended by a signal"),
    ],
)
def test_why_a_worker_ended_is_read_from_its_log(log: str, code: int, kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("error of an earlier worker\n" + log)
    assert problem_in(path, 27, code) == {"code": kind, "message": message, "param": None}


def test_steps_are_watched_on_where_a_worker_that_died_left_none(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    add_job(store, "ftjob-0", {"training_file": "file-x"}, "m", None)
    run = RunFolder(path=store.run("ftjob-0"))
    write_json(run.plan, {"arms": {}})
    watch = Watch(store, "ftjob-0")
    for steps in ([1, 2], [], [1]):  # without a checkpoint, the next worker cuts all lines and begins again
        write_jsonl(run.metrics, [{"arm": "lora", "step": step, "loss": 0.5} for step in steps])
        watch.look()
    said = [event.message for event in list_events(store, "ftjob-0") if event.data]
    assert (said, watch.furthest) == (["Step 2: training loss=0.5000", "Step 1: training loss=0.5000"], 2)
    store.db.close()


@pytest.mark.slow
@pytest.mark.parametrize("grader", [NEAR, PYTHON], ids=lambda grader: grader["type"])
def test_a_reinforcement_job_ends_in_a_model_that_answers(
    grader: dict[str, Any], client: OpenAI, shop: Serving, http: httpx.Client
) -> None:
    wishes = {"n_epochs": 1, "batch_size": 20, "compute_multiplier": 0.5}
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": wishes}}
    job = create(client, shop, upload(client, QUESTIONS), {"shots": None}, method=method, seed=3)
    job = job_when(client, job.id, "succeeded")
    assert job.method
    assert job.method.reinforcement
    assert job.method.reinforcement.grader.name == grader["name"]
    assert job.fine_tuned_model
    turns: Any = [{"role": "user", "content": "Upper case of: abcd"}]
    assert client.chat.completions.create(model=job.fine_tuned_model, messages=turns, max_tokens=4).choices
    ours = job.tunesmith  # type: ignore[attr-defined]
    recipe = yaml.safe_load((Path(ours["run"]) / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["reward"]["by"]) == ("grpo", "grader.py:tunesmith_grade")
    assert [recipe["policy"][name] for name in ("rollouts", "prompts", "group")] == [2, 20, 4]
    assert "reward" in " ".join(messages(client, job.id))
    assert len(http.get(f"{JOBS}/{job.id}/progress").json()["reward"]) == 2
    assert http.get(ours["report"]).status_code == 200


def test_a_row_without_the_graders_field_fails_the_job_with_its_line(client: OpenAI, shop: Serving) -> None:
    rows = QUESTIONS.splitlines(keepends=True)
    rows[2] = b'{"messages": [{"role": "user", "content": "and then?"}]}\n'
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": NEAR}}
    job = create(client, shop, upload(client, b"".join(rows), "q.jsonl"), {"shots": None}, method=method)
    error = job_when(client, job.id, "failed").error
    assert error
    assert "training/q.jsonl:3: the row has no 'answer'" in error.message


def test_python_graders_are_refused_unless_they_are_allowed(
    client: OpenAI, shop: Serving, serve: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": PYTHON}}
    careful = serve(tiny_model_folder, jobs=tmp_path / "jobs")
    with OpenAI(base_url=f"{careful.url}/v1", api_key="none", max_retries=0) as one:
        file = upload(one, QUESTIONS)
        with pytest.raises(openai.BadRequestError, match="--python-graders") as caught:
            create(one, careful, file, {"shots": None}, method=method)
        assert caught.value.code == "grader_not_allowed"
        assert one.fine_tuning.jobs.list().data == []


def asked(shop: Serving, **changes: Any) -> dict[str, Any]:
    return {"model": shop.hall.base_name, "training_file": "file-unknown", **changes}


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({}, 404, "training_file"),
        ({"model": "gpt-4o-mini"}, 400, "model"),
        ({"training_file": "../../etc/passwd"}, 400, "training_file"),
        ({"suffix": "a:b"}, 400, "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"validation_file": "file-unknown"}, 400, "validation_file"),
        ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
        ({"method": {"type": "reinforcement"}}, 400, "method"),
        ({"method": reinforced({})}, 400, "method"),
        ({"method": reinforced({**NEAR, "operation": "same"})}, 400, "method"),
        ({"method": reinforced({**NEAR, "input": "{{ sample.output_json.x }}"})}, 400, "method"),
        ({"method": reinforced({**PYTHON, "source": "def grade(:"})}, 400, "method"),
        ({"method": reinforced({**PYTHON, "source": "def other(): pass"})}, 400, "method"),
        ({"method": reinforced(NEAR, eval_interval=3)}, 400, "method"),
        ({"method": {"type": "dpo"}, "tunesmith": {"metric": "bleu"}}, 400, "tunesmith"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method"),
        ({"method": {"type": "supervised", "supervised": {}}, "hyperparameters": {}}, 400, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters"),
        ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters"),
        ({"tunesmith": {"metric": "file.py:run"}}, 400, "tunesmith"),
        ({"tunesmith": {"metric": "no_such_metric"}}, 400, "tunesmith"),
        ({"wish": 1}, 400, "wish"),
    ],
    ids=str,
)
def test_a_wish_that_is_not_honoured_is_refused_by_its_name(
    changes: dict[str, Any], status: int, param: str, shop: Serving, http: httpx.Client
) -> None:
    refused = http.post(JOBS, json=asked(shop, **changes))
    assert (refused.status_code, error_of(refused)["param"]) == (status, param)


@pytest.mark.parametrize("kind", ["score_model", "label_model", "multi", "endpoint"])
def test_a_grader_that_is_not_here_is_refused_with_those_that_are(kind: str, shop: Serving, http: httpx.Client) -> None:
    error = error_of(http.post(JOBS, json=asked(shop, method=reinforced({"type": kind, "name": "x"}))))
    assert kind in error["message"]
    for known in ("string_check", "text_similarity", "python"):
        assert known in error["message"]


def test_the_same_rows_are_not_taken_for_training_and_validation(client: OpenAI, shop: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match="the same rows"):
        create(client, shop, upload(client), validation_file=upload(client))


def test_what_is_not_there_is_404(http: httpx.Client) -> None:
    for method, path in [
        *[("GET", f"{JOBS}/ftjob-x{part}") for part in ("", "/events", "/checkpoints", "/progress")],
        *[("POST", f"{JOBS}/ftjob-x/{verb}") for verb in ("cancel", "pause", "resume")],
        *[("GET", "/jobs/ftjob-x/report"), ("GET", "/jobs/..%2f..%2fx/report"), ("GET", "/v1/files/..%2fjobs")],
    ]:
        refused = http.request(method, path)
        assert (refused.status_code, bool(error_of(refused)["message"])) == (404, True), path
    for path in (f"{JOBS}?after=x", "/v1/files?after=x", f"{JOBS}?limit=0", "/v1/files?order=up"):
        assert http.get(path).status_code == 400


# The store


def test_of_a_cancel_and_an_end_at_one_time_only_one_wins(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    order = {"training_file": "file-x"}
    for number in range(20):
        add_job(store, f"ftjob-{number}", order, "m", None)
        assert move(store, f"ftjob-{number}", ("validating_files",), "running", "started")
        with ThreadPoolExecutor(2) as pool:
            ways = [
                pool.submit(move, store, f"ftjob-{number}", ("running",), end, end)
                for end in ("cancelled", "succeeded")
            ]
        assert sorted(way.result() for way in ways) == [False, True]
    assert find_job(store, "ftjob-0").finished
    store.db.close()


def test_a_file_of_jobs_that_is_no_database_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(FolderError, match="not a database"):
        open_store(tmp_path)


def test_a_second_server_on_the_same_jobs_is_refused(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(FolderError, match="in use by process"), held(tmp_path):
        pass


def test_another_starts_only_where_it_fits_beside_what_those_at_work_will_grow_to() -> None:
    assert fits(4.0, [1.0, 3.0], 8.0)
    assert not fits(4.0, [1.0, 3.1], 8.0)


def test_beside_a_job_at_work_one_waits_until_a_plan_says_what_is_needed(tmp_path: Path) -> None:
    store, here = open_store(tmp_path), torch.device("cpu")
    for name in ("ftjob-1", "ftjob-2"):
        add_job(store, name, {"training_file": "file-x"}, "m", None)
    assert has_room(store, [], here)
    assert not has_room(store, ["ftjob-1"], here)
    for gigabytes, room in ((1e-3, True), (1e6, False)):
        arms = {"lora": {"predicted": {"peak_memory_bytes": gigabytes * 1e9}}}
        store.run("ftjob-1").mkdir(parents=True, exist_ok=True)
        (store.run("ftjob-1") / "plan.json").write_text(json.dumps({"arms": arms}))
        assert has_room(store, ["ftjob-1"], here) == room
    store.db.close()


def test_openais_preference_rows_are_comparisons(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    path.write_bytes(CHOICES)
    rows = list(read(str(path), DataSpec(train=str(path))))
    assert all(isinstance(row, Comparison) for row in rows)
    first = rows[0]
    assert isinstance(first, Comparison)
    assert (first.prompt[0].content[-4:], first.chosen.content) == (WORDS[0], WORDS[0].upper())
