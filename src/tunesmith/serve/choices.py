"""Pairs and what people chose, in one SQLite file that neither a crash nor two raters at once can damage.

Write-ahead log, flushed to the disk with every transaction. A choice has an id made by the page, so that one sent twice
counts once; at most one standing choice for each rater, pair and showing. Undoing marks a choice and erases nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ..data.layout import as_dict, content_id, message_of
from ..errors import DataError, FolderError
from ..folder import storage_errors
from ..types import Message
from .sqlite import connect, sqlite_errors, transaction

Side = Literal["a", "b"]
Pick = Literal["left", "right", "tie", "both_bad", "skip"]
FILE_NAME = "choices.sqlite"
SCHEMA_VERSION = 1
LOST = "Check the disk's space and permissions and run again; what was confirmed to raters is in the file."

_SCHEMA = """
CREATE TABLE pair (
    id      TEXT PRIMARY KEY,               -- a hash of prompt and answers
    prompt  TEXT NOT NULL,                  -- JSON list of messages
    a       TEXT NOT NULL,                  -- JSON message
    b       TEXT NOT NULL,
    model_a TEXT NOT NULL DEFAULT '',       -- who wrote the answer, where known
    model_b TEXT NOT NULL DEFAULT '',
    gold    TEXT NOT NULL DEFAULT '' CHECK (gold IN ('', 'a', 'b'))
);
CREATE TABLE choice (
    number  INTEGER PRIMARY KEY AUTOINCREMENT,
    id      TEXT NOT NULL UNIQUE,           -- made by the page
    rater   TEXT NOT NULL,
    pair    TEXT NOT NULL REFERENCES pair (id),
    repeat  INTEGER NOT NULL CHECK (repeat IN (0, 1)),
    left    TEXT NOT NULL CHECK (left IN ('a', 'b')),
    pick    TEXT NOT NULL CHECK (pick IN ('left', 'right', 'tie', 'both_bad', 'skip')),
    seconds REAL NOT NULL,                  -- from showing the pair to the choice, as the page measured it
    time    TEXT NOT NULL,                  -- UTC
    undone  TEXT NOT NULL DEFAULT ''        -- when it was taken back
);
CREATE UNIQUE INDEX standing ON choice (rater, pair, repeat) WHERE undone = '';
CREATE TABLE drawn (                        -- answers on their way to a pair
    prompt  TEXT NOT NULL,
    side    TEXT NOT NULL CHECK (side IN ('a', 'b')),
    text    TEXT NOT NULL,
    cut     INTEGER NOT NULL,               -- whether the length limit ended it
    PRIMARY KEY (prompt, side)
);
CREATE TABLE note (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class ConflictError(DataError):
    """A choice or an undo that contradicts what is recorded; nothing was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt. `gold` is the side known to be better, on pairs that check attention."""

    prompt: tuple[Message, ...]
    a: Message
    b: Message
    model_a: str = ""
    model_b: str = ""
    gold: Side | Literal[""] = ""

    @property
    def id(self) -> str:
        """A hash of the prompt, both answers and which of them is known to be better."""
        return content_id([as_dict(turn) for turn in self.prompt], as_dict(self.a), as_dict(self.b), self.gold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one rater said of one pair. `left` is the answer that stood on the left; `repeat` its second showing."""

    id: str
    rater: str
    pair: str
    repeat: bool
    left: Side
    pick: Pick
    seconds: float
    time: str = ""
    undone: str = ""

    @property
    def verdict(self) -> Literal["a", "b", "tie", "both_bad", "skip"]:
        """The pick in terms of the answers rather than of their places."""
        if self.pick == "left":
            return self.left
        if self.pick == "right":
            return "b" if self.left == "a" else "a"
        return self.pick

    @property
    def decided(self) -> bool:
        """Whether one answer was preferred."""
        return self.pick in ("left", "right")


@contextmanager
def opened(folder: Path, *, create: bool = False) -> Iterator[sqlite3.Connection]:
    """The store of `folder`. Raises FolderError where there is none (unless `create`) or it cannot be used."""
    path = folder / FILE_NAME
    if not create and not path.is_file():
        fix = "Run `tunesmith label` on the recipe first, or give its --out."
        raise FolderError("no pairs have been labelled here", where=str(folder), fix=fix)
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    with sqlite_errors(path, LOST), closing(connect(path, _SCHEMA, SCHEMA_VERSION)) as store:
        yield store


def add_pairs(store: sqlite3.Connection, pairs: Iterable[Pair]) -> int:
    """Add pairs in one transaction and return how many were new; a pair that is there stays as it is."""
    with transaction(store):
        return sum(_add_pair(store, pair) for pair in pairs)


def read_pairs(store: sqlite3.Connection) -> dict[str, Pair]:
    """Every pair by its id."""
    rows = store.execute("SELECT id, prompt, a, b, model_a, model_b, gold FROM pair ORDER BY id")
    return {
        name: Pair(
            prompt=tuple(map(message_of, json.loads(prompt))),
            a=message_of(json.loads(a)),
            b=message_of(json.loads(b)),
            model_a=model_a,
            model_b=model_b,
            gold=gold,
        )
        for name, prompt, a, b, model_a, model_b, gold in rows
    }


def add_choice(store: sqlite3.Connection, choice: Choice) -> bool:
    """Record a choice and wait for the disk; False where the very same one is recorded already.

    Raises ConflictError if its id belongs to another choice, or if the rater has a standing choice on this showing.
    """
    with transaction(store):
        known = store.execute("SELECT rater, pair, repeat, pick FROM choice WHERE id = ?", (choice.id,)).fetchone()
        if known:
            if known != (choice.rater, choice.pair, int(choice.repeat), choice.pick):
                raise ConflictError("this id belongs to another choice", fix="Reload the page.")
            return False
        standing = (choice.rater, choice.pair, int(choice.repeat))
        taken = "SELECT 1 FROM choice WHERE rater = ? AND pair = ? AND repeat = ? AND undone = ''"
        if store.execute(taken, standing).fetchone():
            raise ConflictError("this pair was answered already, perhaps in another tab", fix="Go on with the next.")
        store.execute(
            "INSERT INTO choice (id, rater, pair, repeat, left, pick, seconds, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (choice.id, *standing, choice.left, choice.pick, choice.seconds, choice.time or now()),
        )
    return True


def undo_choice(store: sqlite3.Connection, rater: str, name: str) -> bool:
    """Take back the rater's last standing choice, `name`; False where it is taken back already.

    Raises ConflictError if `name` is not the rater's, or is not the last one that stands.
    """
    with transaction(store):
        row = store.execute("SELECT undone FROM choice WHERE id = ? AND rater = ?", (name, rater)).fetchone()
        if row is None:
            raise ConflictError("you made no such choice", fix="Reload the page.")
        if row[0]:
            return False
        if last_choice(store, rater) != name:
            raise ConflictError("only the last choice can be undone", fix="Undo the later ones first.")
        store.execute("UPDATE choice SET undone = ? WHERE id = ?", (now(), name))
    return True


def last_choice(store: sqlite3.Connection, rater: str) -> str | None:
    """The id of the rater's last standing choice."""
    latest = "SELECT id FROM choice WHERE rater = ? AND undone = '' ORDER BY number DESC LIMIT 1"
    row = store.execute(latest, (rater,)).fetchone()
    return row[0] if row else None


def read_choices(store: sqlite3.Connection, *, undone: bool = False) -> list[Choice]:
    """Standing choices in the order they were made; with `undone` also those taken back."""
    columns = "id, rater, pair, repeat, left, pick, seconds, time, undone"
    where = "" if undone else "WHERE undone = ''"
    rows = store.execute(f"SELECT {columns} FROM choice {where} ORDER BY number")  # noqa: S608 -- our own words
    return [
        Choice(
            id=name,
            rater=rater,
            pair=pair,
            repeat=bool(repeat),
            left=left,
            pick=pick,
            seconds=float(seconds),
            time=time,
            undone=taken_back,
        )
        for name, rater, pair, repeat, left, pick, seconds, time, taken_back in rows
    ]


def add_drawn(store: sqlite3.Connection, side: Side, answers: Mapping[str, tuple[str, bool]], pairs: list[Pair]) -> int:
    """Keep drawn answers (prompt id to text, and whether it was cut) and the pairs they complete, in one transaction.

    Returns how many pairs were new.
    """
    rows = [(prompt, side, text, int(cut)) for prompt, (text, cut) in answers.items()]
    with transaction(store):
        store.executemany("INSERT OR IGNORE INTO drawn (prompt, side, text, cut) VALUES (?, ?, ?, ?)", rows)
        return sum(_add_pair(store, pair) for pair in pairs)


def read_drawn(store: sqlite3.Connection, side: Side) -> dict[str, tuple[str, bool]]:
    """Drawn answers of one side: prompt id to text, and whether it was cut."""
    rows = store.execute("SELECT prompt, text, cut FROM drawn WHERE side = ?", (side,))
    return {prompt: (text, bool(cut)) for prompt, text, cut in rows}


def count_equal(store: sqlite3.Connection) -> int:
    """How many prompts got the same answer twice, and so have no pair."""
    same = "SELECT count(*) FROM drawn a JOIN drawn b USING (prompt) WHERE a.side = 'a' AND b.side = 'b'"
    return store.execute(f"{same} AND a.text = b.text").fetchone()[0]


def keep_note(store: sqlite3.Connection, key: str, value: str) -> str:
    """Write a setting down the first time; return what is written down."""
    with transaction(store):
        store.execute("INSERT OR IGNORE INTO note (key, value) VALUES (?, ?)", (key, value))
        return store.execute("SELECT value FROM note WHERE key = ?", (key,)).fetchone()[0]


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _add_pair(store: sqlite3.Connection, pair: Pair) -> int:
    values = (
        pair.id,
        json.dumps([as_dict(turn) for turn in pair.prompt], ensure_ascii=False),
        json.dumps(as_dict(pair.a), ensure_ascii=False),
        json.dumps(as_dict(pair.b), ensure_ascii=False),
        pair.model_a,
        pair.model_b,
        pair.gold,
    )
    return store.execute("INSERT OR IGNORE INTO pair VALUES (?, ?, ?, ?, ?, ?, ?)", values).rowcount
