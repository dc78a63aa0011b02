"""A folder that is made once, however many processes want it: others wait, and what a killed one left is deleted."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..folder import manifest_problem, storage_errors


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, written by `make` unless it is there as its manifest says. Raises FolderError, and what `make` does."""
    if manifest_problem(folder, hashes=False):
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if manifest_problem(folder):  # another process may have made it meanwhile
                make(folder)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other processes that make the same folder. The kernel frees the lock of a process that dies."""
    lock = folder.with_name(f".{folder.name}.lock")
    with storage_errors(lock):
        file = lock.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left_over in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left_over)
        yield
