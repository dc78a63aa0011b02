"""The lock by which a job's worker is known: held from its first moment to its last, however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

LOCK = ".worker"


def worker_of(folder: Path) -> int | None:
    """The process that works on the job of `folder`; None where there is none, 0 where it has not said its id yet."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return int(os.pread(lock, 32, 0) or b"0")
    finally:
        os.close(lock)


def end_worker(pid: int) -> None:
    """SIGTERM to a worker whose lock is held, so that the id is still its own."""
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
