"""Sequences that live on disk, so that memory does not grow with the file of rows.

A `Stored` sequence writes each value once to a temporary file and reads it back when it is asked for: 8 bytes of
memory a value. Up to 4 MB on the disk they stay in memory as well (some 20 MB), so that a small file is not read
back. A `View` is some of another sequence in an order of its own: 8 bytes a value again. Both behave as the tuple of
those values. The temporary file has no name, so it is gone when the process ends, however it ends; it stands where
`$TMPDIR` says.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from ..folder import storage_errors
from ..types import Comparison, Conversation, Example, LedgerEntry, Message, Row
from .layout import message_of

T = TypeVar("T")

# On the disk, up to which a Stored's values stay in memory too; as objects they take some 5 times that.
KEPT_BYTES = 4 << 20


class Lazy(Sequence[T]):
    """A sequence whose values are made one at a time by `_at`; a slice of it is a View."""

    def _at(self, place: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        places = range(len(self))[index]
        return View(self._at, places) if isinstance(places, range) else self._at(places)

    def __iter__(self) -> Iterator[T]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


class View(Lazy[T]):
    """`make(place)` for each of `places`, in their order."""

    def __init__(self, make: Callable[[int], T], places: range | np.ndarray) -> None:
        self._make, self._places = make, places

    def __len__(self) -> int:
        return len(self._places)

    def only(self, kept: Iterable[int] | np.ndarray) -> View[T]:
        """The values at the places `kept` of this view, in that order."""
        return View(self._make, np.asarray(self._places)[_indices(kept)])

    def restored(self) -> View[T]:
        """The same values in the order of the sequence that they were chosen from."""
        return View(self._make, np.sort(self._places))

    def _at(self, place: int) -> T:
        return self._make(int(self._places[place]))


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How values of one kind lie on the disk."""

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]

    def write(self, values: Iterable[T], path: Path) -> None:
        """Keep values in files of their own, for another process: PATH.bin, and in PATH.npy where each one ends."""
        ends = array("q", [0])
        with storage_errors(path), path.with_suffix(".bin").open("wb") as file:
            for value in values:
                ends.append(ends[-1] + file.write(self.encode(value)))
            np.save(path.with_suffix(".npy"), np.array(ends), allow_pickle=False)

    def read(self, path: Path) -> Lazy[T]:
        """The values that were written there, read one at a time. Raises FolderError."""
        with storage_errors(path):
            ends, file = np.load(path.with_suffix(".npy"), allow_pickle=False), path.with_suffix(".bin").open("rb")

        def at(place: int) -> T:
            start, end = int(ends[place]), int(ends[place + 1])
            return self.decode(os.pread(file.fileno(), end - start, start))

        weakref.finalize(at, file.close)  # all views of the values hold `at`
        return View(at, range(len(ends) - 1))


class Stored(Lazy[T]):
    """Values appended once to a temporary file. Raises FolderError when the disk is full."""

    def __init__(self, codec: Codec[T], values: Iterable[T] = ()) -> None:
        self._codec, self._ends = codec, array("q", [0])
        self._kept: list[T] = []
        with storage_errors(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self.extend(values)

    def append(self, value: T) -> None:
        """Add a value at the end."""
        whole = data = self._codec.encode(value)
        end = self._ends[-1]
        with storage_errors(Path(tempfile.gettempdir())):
            while data:
                # At a place of its own, as the reads: forked processes share the file's position.
                written = os.pwrite(self._file.fileno(), data, end)
                data, end = data[written:], end + written
        self._ends.append(end)
        if end <= KEPT_BYTES:
            self._kept.append(self._codec.decode(whole))  # what the disk would give, whatever the size of the whole
        elif self._kept:
            self._kept = []

    def extend(self, values: Iterable[T]) -> None:
        """Add values at the end."""
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _at(self, place: int) -> T:
        if place < len(self._kept):
            return self._kept[place]
        start, end = self._ends[place], self._ends[place + 1]
        return self._codec.decode(os.pread(self._file.fileno(), end - start, start))


def some(values: Sequence[T], places: Iterable[int] | np.ndarray) -> View[T]:
    """The values at `places`, in that order."""
    return View(values.__getitem__, _indices(places))


def join(*parts: Sequence[T]) -> View[T]:
    """All values of several sequences, one sequence after the other."""

    def at(place: int) -> T:
        for part in parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)

    return View(at, range(sum(map(len, parts))))


def stored_rows(rows: Iterable[Row] = ()) -> Stored[Row]:
    """Rows on disk."""
    return Stored(ROWS, rows)


def stored_ledger(entries: Iterable[LedgerEntry] = ()) -> Stored[LedgerEntry]:
    """Ledger entries on disk."""
    return Stored(LEDGER, entries)


def stored_examples(examples: Iterable[Example] = ()) -> Stored[Example]:
    """Examples on disk, as 4 bytes a token id and 4 a weight or other number."""
    return Stored(EXAMPLES, examples)


def digest(text: str | bytes) -> int:
    """64 bits that stand for `text`: two texts of ten million share them with a probability under 1 in 300,000."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


class Places:
    """A dictionary from texts to places, in 24 to 48 bytes an entry: open addressing on 64-bit digests."""

    def __init__(self) -> None:
        self._keys, self._places, self._count = array("Q", [0] * 8), array("q", [-1] * 8), 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, text: str | bytes) -> int:
        """The place of `text`, or -1."""
        return self._places[self._slot(digest(text))]

    def __setitem__(self, text: str | bytes, place: int) -> None:
        self._put(digest(text), place)

    def setdefault(self, text: str | bytes, place: int) -> int:
        """The place of `text`, which is `place` if it had none."""
        known = self[text]
        if known < 0:
            self[text] = place
        return place if known < 0 else known

    def _put(self, key: int, place: int) -> None:
        slot = self._slot(key)
        if self._places[slot] < 0:
            self._count += 1
        self._keys[slot], self._places[slot] = key, place
        if 3 * self._count > 2 * len(self._keys):
            self._grow()

    def _slot(self, key: int) -> int:
        """Where `key` stands, or would."""
        keys, places, last = self._keys, self._places, len(self._keys) - 1
        slot = key & last
        while places[slot] >= 0 and keys[slot] != key:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, places = self._keys, self._places
        size = 2 * len(keys)
        self._keys, self._places, self._count = array("Q", bytes(8 * size)), array("q", [-1]) * size, 0
        for key, place in zip(keys, places, strict=True):
            if place >= 0:
                self._put(key, place)


def _indices(places: Iterable[int] | np.ndarray) -> np.ndarray:
    return places if isinstance(places, np.ndarray) else np.fromiter(places, np.int64)


def _to_json(value: object) -> bytes:
    return json.dumps(value, default=_fields, separators=(",", ":")).encode("ascii")


def _fields(value: Any) -> dict[str, object]:
    """A data class or a mapping that is no dict, as JSON wants it."""
    if isinstance(value, Mapping):
        return dict(value)
    return {name: getattr(value, name) for name in value.__slots__}


def _row(data: bytes) -> Row:
    fields = json.loads(data)
    if "chosen" in fields:
        answers = {name: message_of(fields[name]) for name in ("chosen", "rejected")}
        return Comparison(**{**fields, **answers, "prompt": _messages(fields["prompt"])})
    return Conversation(**{**fields, "messages": _messages(fields["messages"]), "tools": tuple(fields["tools"])})


def _messages(turns: Iterable[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple(map(message_of, turns))


def _example_bytes(example: Example) -> bytes:
    head = json.dumps([example.id, len(example.tokens), *example.extra]).encode("ascii") + b"\n"
    numbers = [np.asarray(values, "<f4").tobytes() for values in (example.weights, *example.extra.values())]
    return b"".join([head, np.asarray(example.tokens, "<i4").tobytes(), *numbers])


def _example(data: bytes) -> Example:
    head, body = data.split(b"\n", 1)
    name, length, *extra = json.loads(head)
    numbers = np.frombuffer(body, "<f4", offset=4 * length).reshape(1 + len(extra), length)
    return Example(
        tokens=np.frombuffer(body, "<i4", count=length).astype(np.int64),
        weights=numbers[0].copy(),
        id=name,
        extra={key: numbers[1 + place].copy() for place, key in enumerate(extra)},
    )


ROWS: Codec[Row] = Codec(_to_json, _row)
LEDGER: Codec[LedgerEntry] = Codec(_to_json, lambda data: LedgerEntry(**json.loads(data)))
EXAMPLES: Codec[Example] = Codec(_example_bytes, _example)
