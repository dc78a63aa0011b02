"""SQLite as every store here uses it: a write-ahead log, flushed to the disk with every transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError

WAIT_SECONDS = 10.0  # for another process to finish its transaction


def connect(path: Path, schema: str, version: int) -> sqlite3.Connection:
    """Open the store, made by `schema` where it is new. Raises FolderError where another version made it."""
    # Whoever holds the connection uses it from one thread at a time, which need not be the one that opened it.
    store = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("PRAGMA synchronous = FULL")
        store.execute("PRAGMA foreign_keys = ON")
        with transaction(store):
            found = store.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in schema.split(";\n"):
                    store.execute(statement)
                store.execute(f"PRAGMA user_version = {version}")
        if found not in (0, version):
            fix = "Use that version of Tunesmith, or another folder."
            raise FolderError(f"was made by another version of Tunesmith ({found})", where=str(path), fix=fix)
    except BaseException:
        store.close()
        raise
    return store


@contextmanager
def transaction(store: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, with no other writer in between."""
    store.execute("BEGIN IMMEDIATE")
    try:
        yield
        store.execute("COMMIT")
    except BaseException:
        if store.in_transaction:  # a full disk may have ended it already
            store.execute("ROLLBACK")
        raise


@contextmanager
def sqlite_errors(path: Path, fix: str) -> Iterator[None]:
    """Turn SQLite's errors into a FolderError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise FolderError(f"cannot be read or written ({error})", where=str(path), fix=fix) from error
