"""Fine-tuning jobs and what happened to them, in one SQLite file beside their folders.

    JOBS/jobs.sqlite              files, jobs and events
    JOBS/files/file-...           what was uploaded
    JOBS/jobs/ftjob-.../          a job: recipe.yaml, its own copy of the rows, log.txt, run/ (the run folder)

    validating_files -> queued -> running -> succeeded | failed | cancelled
                          ^  \\______ | ____> cancelled, paused
                          |__________/ paused, failed

Every change of a job's status is one transaction that names the statuses it may come from, so that a cancel and the end
of a worker cannot both win.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import string
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from ..errors import TunesmithError
from .problems import Problem
from .sqlite import connect, sqlite_errors, transaction

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
FILE_NAME = "jobs.sqlite"
SCHEMA_VERSION = 1
LETTERS = string.ascii_letters + string.digits

_SCHEMA = """
CREATE TABLE file (
    number   INTEGER PRIMARY KEY AUTOINCREMENT,
    id       TEXT NOT NULL UNIQUE,
    name     TEXT NOT NULL,                 -- as the client called it
    purpose  TEXT NOT NULL,
    bytes    INTEGER NOT NULL,
    sha256   TEXT NOT NULL,
    created  INTEGER NOT NULL,              -- Unix seconds, as all times here
    token    TEXT UNIQUE                    -- the client's Idempotency-Key
);
CREATE TABLE job (
    number   INTEGER PRIMARY KEY AUTOINCREMENT,
    id       TEXT NOT NULL UNIQUE,
    asked    TEXT NOT NULL,                 -- the request, as JSON
    model    TEXT NOT NULL,                 -- the name by which the result is served
    status   TEXT NOT NULL,
    created  INTEGER NOT NULL,
    finished INTEGER,
    error    TEXT,                          -- JSON: code, message, param
    kills    INTEGER NOT NULL DEFAULT 0,    -- workers that died in a row without a word
    tokens   INTEGER,
    result   TEXT,                          -- id of the file with the losses
    token    TEXT UNIQUE
);
CREATE TABLE event (
    number   INTEGER PRIMARY KEY AUTOINCREMENT,
    job      TEXT NOT NULL REFERENCES job (id),
    created  INTEGER NOT NULL,
    level    TEXT NOT NULL,
    message  TEXT NOT NULL,
    data     TEXT,                          -- JSON, for a step or an evaluation
    key      TEXT,                          -- which step, so that one done again is told once
    UNIQUE (job, key)
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of the table. `asked` is the request, `error` what OpenAI's `error` holds."""

    number: int
    id: str
    asked: Mapping[str, Any]
    model: str
    status: Status
    created: int
    finished: int | None
    error: Mapping[str, Any] | None
    kills: int
    tokens: int | None
    result: str | None
    token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a job; `data` only for a step or an evaluation."""

    number: int
    created: int
    level: Level
    message: str
    data: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """The open file, used by one thread at a time, and the folder around it."""

    folder: Path
    db: sqlite3.Connection
    lock: RLock = field(default_factory=RLock)

    @property
    def files(self) -> Path:
        """Where uploads lie."""
        return self.folder / "files"

    def job(self, name: str) -> Path:
        """The folder of a job."""
        return self.folder / "jobs" / name

    def run(self, name: str) -> Path:
        """The run folder of a job."""
        return self.job(name) / "run"


def open_store(folder: Path) -> Store:
    """The store in `folder`, made where there is none. Raises FolderError."""
    path = folder / FILE_NAME
    with sqlite_errors(path, "Check the disk's space and permissions, or choose another folder."):
        return Store(folder=folder, db=connect(path, _SCHEMA, SCHEMA_VERSION))


@contextmanager
def writing(store: Store) -> Iterator[sqlite3.Connection]:
    """One transaction, with no other thread in between."""
    with store.lock, transaction(store.db):
        yield store.db


@contextmanager
def reading(store: Store) -> Iterator[sqlite3.Connection]:
    """The connection, alone."""
    with store.lock:
        yield store.db


def new_id(kind: str) -> str:
    """`kind-` and 24 letters that nobody can guess."""
    return f"{kind}-{''.join(secrets.choice(LETTERS) for _ in range(24))}"


def seconds() -> int:
    """Now, in Unix seconds."""
    return int(time.time())


def add_job(store: Store, job: str, asked: Mapping[str, Any], model: str, token: str | None) -> Job:
    """A new job, whose files are to be validated; with a known token the job that it made the first time.

    Raises Problem where the token came with another request.
    """
    with writing(store) as db:
        if known := known_job(store, asked, token):
            return known
        db.execute(
            "INSERT INTO job (id, asked, model, status, created, token) VALUES (?, ?, ?, 'validating_files', ?, ?)",
            (job, json.dumps(asked, ensure_ascii=False), model, seconds(), token),
        )
        _tell(db, job, "info", f"Created fine-tuning job: {job}")
        _tell(db, job, "info", "Validating training file: " + asked["training_file"])
        found = _one(db, "id", job)
    assert found
    return found


def known_job(store: Store, asked: Mapping[str, Any], token: str | None) -> Job | None:
    """The job that this token made. Raises Problem where it came with another request then."""
    if token is None:
        return None
    with reading(store) as db:
        known = _one(db, "token", token)
    if known and known.asked != asked:
        raise Problem(409, "this Idempotency-Key belongs to another request", code="idempotency_key_reused")
    return known


def find_job(store: Store, name: str) -> Job:
    """The job. Raises Problem where there is none."""
    with reading(store) as db:
        found = _one(db, "id", name)
    if found is None:
        raise Problem(404, "there is no such fine-tuning job", param="fine_tuning_job_id")
    return found


def list_jobs(store: Store, statuses: Sequence[Status] = ()) -> list[Job]:
    """All jobs in the order in which they came, or those of some statuses."""
    where = f"WHERE status IN ({_marks(statuses)})" if statuses else ""
    with reading(store) as db:
        return [_job(row) for row in db.execute(f"{_SELECT} {where} ORDER BY number", statuses)]


def move(store: Store, name: str, before: Sequence[Status], after: Status, message: str) -> bool:
    """Change a job's status and tell of it; False, and nothing done, where it is in none of the statuses `before`."""
    with writing(store) as db:
        return _move(db, name, before, after, message)


def fail(store: Store, name: str, before: Sequence[Status], error: Mapping[str, Any]) -> bool:
    """End a job with a reason (`code`, `message`, `param`); False where it is in none of the statuses `before`."""
    with writing(store) as db:
        failed = _move(db, name, before, "failed", f"The job failed: {error['message']}", "error")
        if failed:
            db.execute("UPDATE job SET error = ? WHERE id = ?", (json.dumps(error), name))
    return failed


def succeed(store: Store, name: str, tokens: int | None, result: str | None) -> bool:
    """End a job well; False where it was cancelled or paused meanwhile."""
    with writing(store) as db:
        done = _move(db, name, ("running",), "succeeded", "The job has successfully completed")
        if done:
            update = "UPDATE job SET tokens = ?, result = ?, error = NULL, kills = 0 WHERE id = ?"
            db.execute(update, (tokens, result, name))
    return done


def queue_again(store: Store, name: str) -> bool:
    """Put a job that was paused or failed at work back into the queue; its run goes on where it was."""
    with writing(store) as db:
        queued = _move(db, name, ("paused", "failed"), "queued", "Fine-tuning job resumed")
        if queued:
            db.execute("UPDATE job SET kills = 0, error = NULL WHERE id = ?", (name,))
    return queued


def count_kill(store: Store, name: str, *, again: bool) -> int:
    """A worker died; returns how many did one after the other, the first of which is not one `again`."""
    with writing(store) as db:
        db.execute("UPDATE job SET kills = CASE WHEN ? THEN kills + 1 ELSE 1 END WHERE id = ?", (again, name))
        return db.execute("SELECT kills FROM job WHERE id = ?", (name,)).fetchone()[0]


def tell(store: Store, name: str, message: str, level: Level = "info") -> None:
    """Add an event."""
    with writing(store) as db:
        _tell(db, name, level, message)


def tell_numbers(store: Store, name: str, told: Iterable[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Add events of steps: each a key, a message and numbers. One whose key is known stays as it is."""
    with writing(store) as db:
        for key, message, data in told:
            _tell(db, name, "info", message, data, key)


def list_events(store: Store, name: str) -> list[Event]:
    """A job's events, the newest first."""
    query = "SELECT number, created, level, message, data FROM event WHERE job = ? ORDER BY number DESC"
    with reading(store) as db:
        return [
            Event(number=number, created=at, level=level, message=message, data=json.loads(data) if data else None)
            for number, at, level, message, data in db.execute(query, (name,))
        ]


def explained(error: TunesmithError, folder: Path, *, param: str | None = None) -> dict[str, Any]:
    """An error of ours as a job's `error`; files are named as they are called inside `folder`."""
    said = ". ".join(line.rstrip(".") for line in str(error).replace(f"{folder}/", "").splitlines())
    return {"code": _code(error), "message": f"{said}.", "param": param}


_COLUMNS = "number, id, asked, model, status, created, finished, error, kills, tokens, result, token"
_SELECT = f"SELECT {_COLUMNS} FROM job"  # noqa: S608 -- our own words


def _one(db: sqlite3.Connection, column: Literal["id", "token"], value: str) -> Job | None:
    row = db.execute(f"{_SELECT} WHERE {column} = ?", (value,)).fetchone()
    return _job(row) if row else None


def _job(row: tuple[Any, ...]) -> Job:
    fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
    error = json.loads(fields["error"]) if fields["error"] else None
    return Job(**{**fields, "asked": json.loads(fields["asked"]), "error": error})


def _move(
    db: sqlite3.Connection,
    name: str,
    before: Sequence[Status],
    after: Status,
    message: str,
    level: Level = "info",
) -> bool:
    ended = seconds() if after in ("succeeded", "failed", "cancelled") else None
    query = f"UPDATE job SET status = ?, finished = ? WHERE id = ? AND status IN ({_marks(before)})"  # noqa: S608
    changed = db.execute(query, (after, ended, name, *before)).rowcount == 1
    if changed:
        _tell(db, name, level, message)
    return changed


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))


def _tell(
    db: sqlite3.Connection, name: str, level: Level, message: str, data: object = None, key: str | None = None
) -> None:
    values = (name, seconds(), level, message, None if data is None else json.dumps(data), key)
    insert = "INSERT OR IGNORE INTO event (job, created, level, message, data, key) VALUES (?, ?, ?, ?, ?, ?)"
    db.execute(insert, values)


def _code(error: TunesmithError) -> str:
    """`DataError` becomes `data_error`."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
