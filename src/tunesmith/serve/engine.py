"""One thread owns the model: rows of all requests are admitted, advanced and left side by side, whatever they ask.

    ask        from the event loop: a row waits, or BusyError is raised
    Drawn      to the event loop: one token, and why the row ended if it did
    do         a function to call between two steps: adapters come and go this way

Rows wait in the order in which they came. A waiting row is admitted as soon as there is a free slot; between two
admissions the live rows draw a token, so that nobody waits for a queue to be worked off.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from ..errors import ModelError
from ..memory import available_bytes
from ..model.few_rows import kept_twice, steady_answer
from ..model.load import Model
from ..model.many import Adapters
from ..model.peft_layout import Adapter
from ..model.sample import Live, Row, compiles, how_many, stopped
from ..model.steady import SteadyDecode
from ..types import Stop

T = TypeVar("T")
FIRST_CAPACITY_TOKENS = 256  # of each slot; grows with what is asked
FEW_THREADS = 4  # compiled passes use one: with more, long rows are better shared by PyTorch's


class BusyError(Exception):
    """More answers wait than may."""


class GoneError(Exception):
    """The adapter was removed before the row was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one server takes on: `rows` are answered side by side, `waiting` more may queue up; prompt and answer
    of a row together have at most `context_tokens`.
    """

    rows: int = 16
    waiting: int = 256
    context_tokens: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One more token of a row. `stop` says why it is the last, `failed` that there is none, and why."""

    token: int = -1
    log_prob: float = 0.0
    rivals: tuple[tuple[int, float], ...] = ()
    stop: Stop | None = None
    failed: str = ""


Tell = Callable[[Drawn], None]


@dataclass(slots=True, eq=False)
class Asked:
    """A row on its way, and who hears of it. `tell` is called on the engine's thread."""

    row: Row
    tell: Tell
    unwanted: bool = False


class Engine:
    """The thread, its rows and its adapters. `close` lets accepted rows end first."""

    def __init__(self, model: Model, limits: Limits) -> None:
        if not model.packs:
            fix = "Ask it with `tunesmith evaluate` or `chat`, one row at a time."
            raise ModelError("rows of this architecture cannot be answered side by side", where="serve", fix=fix)
        self.model, self.limits = model, limits
        self.adapters = Adapters(model)
        self.waiting: deque[Asked] = deque()
        self.live = self._fresh()
        self.asked: dict[Row, Asked] = {}
        self._removed: set[str] = set()  # as whoever asks knows it
        self._retired: set[str] = set()  # of these, what rows under way may still use
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def ask(self, *asked: Asked) -> None:
        """Let rows wait their turn, all or none.

        Raises BusyError when the queue has no room for them, GoneError when an adapter of theirs was removed: admitted,
        such a row would end those beside it.
        """
        if not self.has_room(len(asked)):
            raise BusyError
        if not self._removed.isdisjoint(one.row.adapter for one in asked):
            raise GoneError
        self.waiting.extend(asked)
        self._inbox.put(_nothing)  # wakes the thread

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows may wait."""
        return len(self.waiting) + rows <= self.limits.waiting

    def forget(self, asked: Asked) -> None:
        """Free the row's place; it is told nothing more."""
        asked.unwanted = True
        self._inbox.put(_nothing)

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` on the engine's thread between two steps."""
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(carry_out)
        return future

    def add_adapter(self, name: str, adapter: Adapter) -> Future[None]:
        """Load an adapter beside the others. The future raises ModelError where it does not fit."""
        return self.do(lambda: self.adapters.add(name, adapter))

    def remove_adapter(self, name: str) -> None:
        """Take no more rows for an adapter, and forget it once those that use it have ended; call it where `ask` is."""
        self._removed.add(name)
        self.do(lambda: self._retired.add(name))

    def close(self) -> None:
        """End the thread after its last row."""

        def end() -> None:
            self._open = False

        self._inbox.put(end)
        self._thread.join()

    # On the engine's thread

    def _work(self) -> None:
        with kept_twice(self.model.hf, available_bytes(self.model.device) / 4, halve=True, steady=True):
            while self._open or self.waiting or self.live.rows:
                self._listen(idle=not self.waiting and not self.live.rows)
                self._drop_unwanted()
                try:
                    self._step()
                except Exception as error:  # one request must not end the others' server
                    self._fail(error)

    def _listen(self, *, idle: bool) -> None:
        """Do what was asked for; wait for something when there is no row."""
        try:
            while True:
                self._inbox.get(block=idle)()
                idle = False
        except Empty:
            pass

    def _step(self) -> None:
        """Admit what there is room for, then draw a token for every live row."""
        if self.waiting and self.live.free:
            rows = [asked.row for asked in list(self.waiting)[: self.live.free]]
            taken = [self.waiting.popleft() for _ in range(how_many(rows, self.live.free))]
            self.asked |= {asked.row: asked for asked in taken}
            self._tell_of(self.live.admit([asked.row for asked in taken]))
        if self.live.rows:
            self._tell_of(self.live.advance())

    def _tell_of(self, rows: Sequence[Row]) -> None:
        for row in rows:
            asked, stop = self.asked[row], stopped(row, self.model)
            if not math.isfinite(row.log_probs[-1]):
                asked.tell(Drawn(failed="the model's output is not a number"))
                self._leave(row)
                continue
            rivals = tuple(row.rivals[-1]) if row.rivals else ()
            asked.tell(Drawn(token=row.tokens[-1], log_prob=row.log_probs[-1], rivals=rivals, stop=stop))
            if stop:
                self._leave(row)

    def _leave(self, row: Row) -> None:
        self.live.leave(row)
        del self.asked[row]

    def _drop_unwanted(self) -> None:
        for row in [row for row, asked in self.asked.items() if asked.unwanted]:
            self._leave(row)
        waiting = list(self.waiting)  # at once: the event loop may append meanwhile
        for asked in waiting:
            if asked.unwanted:
                self.waiting.remove(asked)
        used = {row.adapter for row in self.live.rows} | {asked.row.adapter for asked in waiting}
        for name in self._retired - used:
            self.adapters.remove(name)
        self._retired &= used

    def _fail(self, error: Exception) -> None:
        """Give up the live rows, say why, and begin with an empty cache."""
        for asked in self.asked.values():
            asked.tell(Drawn(failed=f"{type(error).__name__} in the model"))
        self.asked.clear()
        self.live = self._fresh()

    def _fresh(self) -> Live:
        return Live(
            self.model,
            self.limits.rows,
            FIRST_CAPACITY_TOKENS,
            route=self.adapters.route,
            decode=SteadyDecode,
            multiply=steady_answer,
            guesses=False,
            compiled_keys=math.inf if compiles(self.model) and torch.get_num_threads() <= FEW_THREADS else 0,
        )


def _nothing() -> None:
    """What is put into the inbox only to wake its reader."""
