"""What is killed loses nothing: servers and workers that end without a word, a full disk, a server told to stop."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

import tunesmith.cli
from tunesmith.serve.locks import worker_of

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"forgetting": False, "shots": 0, "max_new_tokens": 4, "rank": 2, "test": 0.2}
KEY = "a-key-of-some-length"
STEPS = 600


class Shop:
    """`tunesmith serve BASE --jobs` in a process of its own."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.port = base, folder, 0
        self.process: subprocess.Popen[str] | None = None
        self.clients = ExitStack()

    def start(self, *words: str) -> OpenAI:
        """Start it, on the port that it had before, and wait until it listens."""
        command = [sys.executable, "-m", "tunesmith.cli", "serve", str(self.base), "--jobs", str(self.folder)]
        env = {**os.environ, "PYTHONPATH": str(Path(tunesmith.cli.__file__).parents[1]), "TUNESMITH_KEY": KEY}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *words],
            env=env,
            cwd=self.folder.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        assert self.process.stderr
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
                client = OpenAI(base_url=found[0], api_key=KEY, max_retries=0, timeout=60)
                return self.clients.enter_context(client)
        raise AssertionError("".join(said))

    def end(self, number: int) -> int:
        """Send a signal and wait for the end."""
        assert self.process
        process, self.process = self.process, None
        process.send_signal(number)
        process.communicate()
        return process.returncode


@pytest.fixture
def shop(tiny_model_folder: Path, tmp_path: Path) -> Iterator[Shop]:
    one = Shop(tiny_model_folder, tmp_path / "jobs")
    with one.clients:
        yield one
    if one.process:
        one.end(signal.SIGKILL)
    for folder in (tmp_path / "jobs" / "jobs").glob("*"):
        if pid := worker_of(folder):
            os.kill(pid, signal.SIGKILL)


def rows() -> bytes:
    lines = []
    for number in range(40):
        word = "".join("abcdefgh"[number // 8**place % 8] for place in range(3))
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    return "".join(lines).encode()


def until(what: Callable[[], Any]) -> Any:
    end, pause = time.monotonic() + 120, threading.Event()
    while time.monotonic() < end:
        if found := what():
            return found
        pause.wait(0.02)
    raise AssertionError("never true")


def events(client: OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def steps_written(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def test_a_job_ends_once_though_server_and_worker_are_killed_and_is_served_after_a_restart(shop: Shop) -> None:
    client = shop.start()
    model = client.models.list().data[0].id
    file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id

    # A disk that is full: nothing is kept, and nothing is lost.
    assert shop.process
    limits = resource.prlimit(shop.process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("more.jsonl", rows()), purpose="fine-tune")
    assert (caught.value.status_code, "the disk is full" in str(caught.value)) == (507, True)
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(model=model, training_file=file)
    assert caught.value.status_code == 507
    resource.prlimit(shop.process.pid, resource.RLIMIT_FSIZE, limits)
    assert [one.id for one in client.files.list()] == [file]
    assert client.fine_tuning.jobs.list().data == []

    own: Any = {"tunesmith": {**SMALL, "max_steps": STEPS}}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 200, "batch_size": 4}}}
    made = [
        client.fine_tuning.jobs.create(model=model, training_file=file, method=method, suffix=name, extra_body=own)
        for name in ("one", "two")
    ]
    first, second = made
    folder = shop.folder / "jobs" / first.id

    # The server is killed while a job is at work and another waits: the worker goes on, and the next server finds it.
    until(lambda: steps_written(folder) > 3)
    assert shop.end(signal.SIGKILL) == -signal.SIGKILL
    worker = worker_of(folder)
    assert worker
    client = shop.start()
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    alive = worker_of(folder)
    assert alive in (worker, None)  # None: it has ended meanwhile

    # The worker is killed: it is started again, and goes on.
    if alive:
        os.kill(alive, signal.SIGKILL)
    until(lambda: client.fine_tuning.jobs.retrieve(first.id).status == "succeeded")
    said = events(client, first.id)
    assert [line.split(":")[0] for line in said if "training loss" in line] == [
        f"Step {n}/{STEPS}" for n in range(1, STEPS + 1)
    ]
    assert said.count("The job has successfully completed") == 1
    assert said.count("Fine-tuning job started") == 1

    # A stopped server has ended its workers; a new one serves what was made, by the same name.
    assert shop.end(signal.SIGTERM) == 0
    client = shop.start()
    job = client.fine_tuning.jobs.retrieve(first.id)
    assert job.fine_tuned_model == f"ft:{model}:tunesmith:one:{first.id[-8:]}"
    turns: Any = [{"role": "user", "content": "abc"}]
    assert client.chat.completions.create(model=job.fine_tuned_model, messages=turns, max_tokens=4).choices
    assert client.fine_tuning.jobs.retrieve(second.id).status == "cancelled"

    # The page needs no key, the rest does; a report's link is its own.
    address = str(client.base_url).removesuffix("/v1/")
    import httpx2 as httpx

    assert httpx.get(f"{address}/jobs").status_code == 200
    link = job.tunesmith["report"]  # type: ignore[attr-defined]
    assert httpx.get(address + link).status_code == 200
    for wrong in (link.partition("?")[0], link + "0", link.replace(first.id, second.id)):
        assert httpx.get(address + wrong).status_code == 401
    assert httpx.get(f"{address}/v1/files?{link.partition('?')[2]}").status_code == 401


def test_jobs_at_once_are_each_done_once_though_the_server_is_killed(shop: Shop) -> None:
    client = shop.start("--at-once", "2")
    model = client.models.list().data[0].id
    file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id
    own: Any = {"tunesmith": {**SMALL, "max_steps": STEPS}}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 200, "batch_size": 4}}}
    names = [
        client.fine_tuning.jobs.create(
            model=model,
            training_file=file,
            method=method,
            seed=seed,
            extra_body=own,
            extra_headers={"Idempotency-Key": f"job {seed}"},
        ).id
        for seed in range(3)
    ]

    def statuses() -> list[str]:
        return [client.fine_tuning.jobs.retrieve(name).status for name in names]

    until(lambda: statuses() == ["running", "running", "queued"])
    until(lambda: all(worker_of(shop.folder / "jobs" / name) for name in names[:2]))
    assert "Waiting for memory beside the jobs at work" in events(client, names[1])  # until the first had planned
    shop.end(signal.SIGKILL)
    client = shop.start("--at-once", "2")

    # A client that never heard the answer asks again, and gets the job that there is.
    again = client.fine_tuning.jobs.create(
        model=model,
        training_file=file,
        method=method,
        seed=2,
        extra_body=own,
        extra_headers={"Idempotency-Key": "job 2"},
    )
    assert again.id == names[2]
    until(lambda: statuses() == ["succeeded"] * 3)
    assert [one.id for one in client.fine_tuning.jobs.list()] == names[::-1]
    for name in names:
        said = events(client, name)
        steps = [line.split(":")[0] for line in said if "training loss" in line]
        assert steps == [f"Step {n}/{STEPS}" for n in range(1, STEPS + 1)]
        assert [said.count(line) for line in ("Fine-tuning job started", "The job has successfully completed")] == [
            1,
            1,
        ]


def test_a_job_whose_disk_is_full_says_so_and_goes_on_when_there_is_space(shop: Shop) -> None:
    client = shop.start()
    file = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id
    own: Any = {"tunesmith": {**SMALL, "max_steps": STEPS}}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 200, "batch_size": 4}}}
    job = client.fine_tuning.jobs.create(
        model=client.models.list().data[0].id, training_file=file, method=method, extra_body=own
    )
    folder = shop.folder / "jobs" / job.id
    until(lambda: steps_written(folder) > 3)
    worker = worker_of(folder)
    assert worker
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "failed")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error
    assert (error.code, "the disk is full" in error.message) == ("run_failed", True)
    assert client.fine_tuning.jobs.resume(job.id).error is None
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    steps = [line.split(":")[0] for line in events(client, job.id) if "training loss" in line]
    assert steps == [f"Step {n}/{STEPS}" for n in range(1, STEPS + 1)]
