"""Rewards from the user's own function, `file.py:function`, called thousands of times while a policy is trained.

The function runs in a process of its own. A call that throws, hangs or returns no number costs that answer its score
and is counted; training goes on.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..types import Item

LOAD_SECONDS = 60.0
FIRST_PROBLEMS = 5


class FunctionReward:
    """A Grade by the user's function; NaN where a call fails or takes longer than `seconds`.

    `failures` counts them by kind, `problems` tells of the first few. Raises RecipeError where the file cannot be
    loaded, as load_function does.
    """

    def __init__(self, name: str, root: Path, seconds: float) -> None:
        self.name, self.root, self.seconds = name, root, seconds
        self.failures: Counter[str] = Counter()
        self.problems: list[str] = []
        self._worker: _Worker | None = _Worker(name, root)

    def __call__(self, items: Sequence[Item], answers: Sequence[str]) -> list[float]:
        """One score for each answer, in order."""
        return [self._score(item, answer) for item, answer in zip(items, answers, strict=True)]

    def __enter__(self) -> FunctionReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it is started again if another answer is to be scored."""
        if self._worker:
            self._worker.end()
            self._worker = None

    def _score(self, item: Item, answer: str) -> float:
        self._worker = self._worker or _Worker(self.name, self.root)
        try:
            reply = self._worker.ask({"item": asdict(item), "answer": answer, "seconds": self.seconds}, self.seconds)
        except TimeoutError:
            self.close()
            return self._failed(item, f"took longer than {self.seconds:g} seconds")
        except EOFError:
            self.close()
            return self._failed(item, "ended its process")
        return reply["score"] if "score" in reply else self._failed(item, reply["kind"], reply["error"])

    def _failed(self, item: Item, kind: str, error: str = "") -> float:
        self.failures[kind] += 1
        if len(self.problems) < FIRST_PROBLEMS:
            self.problems.append(f"{self.name}, item {item.id}: {error or f'the function {kind}'}")
        return math.nan


class _Worker:
    """A process that has loaded the function. Raises RecipeError where it could not."""

    def __init__(self, name: str, root: Path) -> None:
        # -P keeps files of the current folder from standing in for modules of the same name.
        command = [sys.executable, "-P", "-m", "tunesmith.evaluate.worker", name, str(root)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.read = b""
        try:
            problem = self._line(LOAD_SECONDS)
        except TimeoutError:
            problem = {
                "what": f"the file takes longer than {LOAD_SECONDS:g} seconds to load",
                "fix": "Load less in it.",
            }
        except EOFError:
            problem = {"what": "the file ends its process while it is loaded", "fix": "Mend the file."}
        if problem:
            self.end()
            raise RecipeError(problem["what"], where=name, fix=problem["fix"])

    def ask(self, request: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """The reply. Raises TimeoutError, or EOFError when the process has ended."""
        assert self.process.stdin
        line = memoryview(json.dumps(request).encode("ascii") + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) or 0 :]
        except BrokenPipeError:
            raise EOFError from None
        return self._line(seconds)

    def end(self) -> None:
        """Kill the process and what it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def _line(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.read:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(self.process.stdout.fileno(), 1 << 16)
                if not part:
                    raise EOFError
                self.read += part
        line, self.read = self.read.split(b"\n", 1)
        return json.loads(line)
