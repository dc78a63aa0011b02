"""The workers: each runs `tunesmith run` on one job's recipe, and is watched from the server's event loop.

A worker holds a lock on a file in its job's folder from its first moment to its last, however it ends. So a server that
was killed finds out, when it is started again, which of its workers live on: it watches those, and starts the others
again. `tunesmith run` goes on from its last checkpoint to the same bits, so a job ends once, whatever was killed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ..errors import FolderError, TunesmithError
from ..folder import RunFolder, read_json, read_jsonl, storage_errors
from ..report.page import write_report
from .files import add_result
from .hall import Hall
from .jobs import (
    Job,
    Store,
    count_kill,
    explained,
    fail,
    find_job,
    list_jobs,
    move,
    succeed,
    tell,
    tell_numbers,
)
from .locks import LOCK, end_worker, worker_of
from .orders import check_rows
from .room import has_room

LOOK_SECONDS = 0.2
RETRY_SECONDS = 1
STOP_SECONDS = 60  # a worker that is told to stop ends its step and saves
MOST_KILLS = 3
INVALID_FILE = "invalid_file"
COMMAND = (sys.executable, "-m", "tunesmith.cli", "run")
NUMBERS = ("loss", "learning_rate", "tokens_per_second", "valid_loss", "valid_metric", "score", "kl", "reward")
SAID = {
    "loss": "training loss",
    "score": "training reward",
    "valid_loss": "validation loss",
    "valid_metric": "validation metric",
    "reward": "validation reward",
}


class Foreman:
    """Starts jobs in their order, at most `at_once` at a time. Used on the event loop."""

    def __init__(self, store: Store, hall: Hall, at_once: int) -> None:
        self.store, self.hall, self.at_once = store, hall, at_once
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._waiting: set[str] = set()
        self._wake = asyncio.Event()
        self._open = True

    @asynccontextmanager
    async def at_work(self, app: FastAPI) -> AsyncIterator[None]:
        """The lifespan of the server: jobs are worked on inside it."""
        work = asyncio.create_task(self._work())
        yield
        self._open = False
        self._wake.set()
        await work

    def look(self) -> None:
        """A job has come, or has changed its status."""
        self._wake.set()

    def stop(self, name: str) -> None:
        """Tell a job's worker to save and end, if it has one."""
        if worker := self._workers.get(name):
            worker.send_signal(signal.SIGTERM)

    async def _work(self) -> None:
        for job in list_jobs(self.store, ("cancelled", "paused")):
            if (pid := worker_of(self.store.job(job.id))) is not None:
                end_worker(pid)
        while self._open:
            self._wake.clear()
            try:
                waiting = self._begin_all()
            except (sqlite3.Error, TunesmithError, OSError):  # a full disk: looked at again
                waiting = True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RETRY_SECONDS if waiting else None)
        for name in self._workers:
            self.stop(name)
        if self._busy:
            await asyncio.wait(self._busy.values(), timeout=STOP_SECONDS)

    def _begin_all(self) -> bool:
        """Begin what may begin: one validation, and as many runs as there are places; those begun before first.

        Returns whether a job waits for memory alone.
        """
        checked = [job for job in list_jobs(self.store, ("validating_files",)) if job.id not in self._busy]
        if checked and "validation" not in self._busy:
            self._begin("validation", checked[0])
        jobs = [*list_jobs(self.store, ("running",)), *list_jobs(self.store, ("queued",))]
        alive = {job.id for job in jobs if worker_of(self.store.job(job.id)) is not None}  # started by whatever server
        for job in sorted(jobs, key=lambda one: one.id not in alive):
            at_work = sorted(self._busy.keys() - {"validation"})
            if job.id in self._busy or len(at_work) >= self.at_once:
                continue
            if job.id not in alive and not has_room(self.store, at_work, self.hall.model.device):
                if job.id not in self._waiting:
                    self._waiting.add(job.id)
                    tell(self.store, job.id, "Waiting for memory beside the jobs at work")
                return True
            if job.status == "running" or move(self.store, job.id, ("queued",), "running", "Fine-tuning job started"):
                self._begin(job.id, job)
        return False

    def _begin(self, place: str, job: Job) -> None:
        async def carry_out() -> None:
            try:
                await (self._validate(job) if place == "validation" else self._run(job.id))
            except Exception as error:  # one job must not end the others' foreman
                problem = (
                    error if isinstance(error, TunesmithError) else FolderError(f"{type(error).__name__}: {error}")
                )
                try:
                    fail(self.store, job.id, (job.status, "running"), explained(problem, self.store.job(job.id)))
                except sqlite3.Error:  # a full disk: the job keeps its status, and is looked at again
                    await asyncio.sleep(RETRY_SECONDS)
            finally:
                del self._busy[place]
                self._wake.set()

        self._busy[place] = asyncio.create_task(carry_out())

    async def _validate(self, job: Job) -> None:
        folder = self.store.job(job.id)
        for part in ("training", "validation"):
            for path in (folder / part).glob("*"):
                try:
                    rows = await asyncio.to_thread(check_rows, path, job.asked)
                except TunesmithError as error:
                    problem = {**explained(error, folder, param=f"{part}_file"), "code": INVALID_FILE}
                    fail(self.store, job.id, ("validating_files",), problem)
                    return
                tell(self.store, job.id, f"{rows} rows in the {part} file")
        move(self.store, job.id, ("validating_files",), "queued", "Files validated, moving job to queued state")

    async def _run(self, name: str) -> None:
        """See a job to its end, whatever ends its workers; return where it was stopped or the server is."""
        folder, run = self.store.job(name), RunFolder(path=self.store.run(name))
        watch = Watch(self.store, name)
        while self._open:
            while (pid := worker_of(folder)) is not None and self._open:  # one that an earlier server started
                if find_job(self.store, name).status != "running":
                    end_worker(pid)
                await asyncio.to_thread(watch.look)
                await asyncio.sleep(LOOK_SECONDS)
            if not self._open or find_job(self.store, name).status != "running":
                return
            if run.results.is_file():
                await asyncio.to_thread(watch.look)
                await self._deliver(name, run)
                return
            log = folder / "log.txt"
            begun, before = log.stat().st_size if log.is_file() else 0, watch.furthest
            code = await self._worker(name, watch)
            if code == 0 and run.results.is_file():
                continue
            if not self._open or find_job(self.store, name).status != "running":
                return
            problem = problem_in(log, begun, code)
            if problem["code"] != "worker_killed":
                fail(self.store, name, ("running",), explained_text(problem, folder))
                return
            if count_kill(self.store, name, again=watch.furthest <= before) >= MOST_KILLS:
                problem = {**problem, "message": f"{problem['message']} {MOST_KILLS} times without getting further"}
                fail(self.store, name, ("running",), problem)
                return
            tell(self.store, name, f"{problem['message']}; it is started again where it was", "warn")

    async def _worker(self, name: str, watch: Watch) -> int:
        """Start a worker and wait for its end; returns its exit code."""
        worker = self._workers[name] = start_worker(self.store.job(name))
        try:
            while worker.poll() is None:
                await asyncio.to_thread(watch.look)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            del self._workers[name]
        await asyncio.to_thread(watch.look)
        return worker.wait()

    async def _deliver(self, name: str, run: RunFolder) -> None:
        """Serve the adapter, then say that the job has succeeded."""
        if not run.report.is_file():  # the worker was killed between results and report
            await asyncio.to_thread(write_report, run.path)
        job = find_job(self.store, name)
        if job.model not in self.hall.served:
            await self.hall.add(run.path, job.model)
        results = read_json(run.results)
        tokens = results["arms"][results["subject"]].get("train", {}).get("tokens")
        result = add_result(self.store, name, losses(run))
        if not succeed(self.store, name, None if tokens is None else int(tokens), result):
            self.hall.remove(job.model)


class Watch:
    """Turns a run's numbers into events, as they are written. Each step is told once, however often it is done."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.run = RunFolder(path=store.run(name))
        self.furthest = 0
        self._seen: tuple[int, int] = (0, 0)
        self._told = 0

    def look(self) -> None:
        """Tell what is new. Numbers are only for show: what cannot be read or kept now is tried again later."""
        with suppress(TunesmithError, OSError, sqlite3.Error):
            found = self.run.metrics.stat()
            if (found.st_ino, found.st_size) == self._seen:
                return
            if found.st_ino != self._seen[0]:
                self._told = 0  # lines of steps that a crash undid were cut off
            lines = read_jsonl(self.run.metrics)
            tell_numbers(self.store, self.name, [spoken(line, self._steps(line)) for line in lines[self._told :]])
            self._seen, self._told = (found.st_ino, found.st_size), len(lines)
            self.furthest = max([self.furthest, *(line["step"] for line in lines)])

    def _steps(self, line: Mapping[str, Any]) -> int | None:
        return read_json(self.run.plan)["arms"].get(line["arm"], {}).get("steps")


def spoken(line: Mapping[str, Any], steps: int | None) -> tuple[str, str, Mapping[str, Any]]:
    """A line of metrics.jsonl as an event: its key, what it says, its numbers."""
    kind = "loss" if "loss" in line else "look"
    of = f"/{steps}" if steps else ""
    said = ", ".join(f"{SAID[name]}={line[name]:.4f}" for name in SAID if isinstance(line.get(name), (int, float)))
    numbers = {name: line[name] for name in NUMBERS if name in line}
    data = {"step": line["step"], "total_steps": steps, **numbers}
    new = {"loss": "train_loss", "score": "train_reward", "reward": "valid_reward"}
    renamed = {new.get(key, key): value for key, value in data.items()}
    return f"{line['arm']}:{line['step']}:{kind}", f"Step {line['step']}{of}: {said or 'evaluated'}", renamed


def losses(run: RunFolder) -> list[str]:
    """A run's losses as the lines of a CSV file with OpenAI's columns."""
    rows: dict[int, dict[str, Any]] = {}
    for line in read_jsonl(run.metrics):
        wanted = {"train_loss": line.get("loss"), "valid_loss": line.get("valid_loss")}
        rows.setdefault(line["step"], {}).update({key: value for key, value in wanted.items() if value is not None})
    lines = [f"{step},{row.get('train_loss', '')},{row.get('valid_loss', '')}" for step, row in sorted(rows.items())]
    return ["step,train_loss,valid_loss", *lines]


def start_worker(folder: Path) -> subprocess.Popen[bytes]:
    """Start `tunesmith run` on the job of `folder`. Raises FolderError where another worker has it."""
    with storage_errors(folder):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child inherits it, and only its end lets go of it
            os.ftruncate(lock, 0)
            with (folder / "log.txt").open("ab") as log:
                worker = subprocess.Popen(
                    [*COMMAND, str(folder / "recipe.yaml")],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={key: value for key, value in os.environ.items() if key != "TUNESMITH_KEY"},
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C in the server's terminal is for the server
                )
            os.pwrite(lock, str(worker.pid).encode("ascii"), 0)
        finally:
            os.close(lock)
    return worker


def problem_in(log: Path, begun: int, code: int) -> dict[str, Any]:
    """Why a worker ended, from its exit code and what it wrote since `begun`: an error of ours, or its last line."""
    with storage_errors(log), log.open("rb") as file:
        file.seek(begun)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error ")]
    said = " ".join(lines[starts[-1] :]).removeprefix("error ") if starts else ""
    if code < 0 or code in (130, 143):
        by = signal.Signals(-code).name if code < 0 else "a signal"
        return {"code": "worker_killed", "message": f"the worker was ended by {by}", "param": None}
    if not said:
        said = f"the worker ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
    return {"code": "run_failed", "message": said, "param": None}


def explained_text(problem: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The problem, with files named as they are called inside `folder`."""
    return {**problem, "message": problem["message"].replace(f"{folder}/", "")}
