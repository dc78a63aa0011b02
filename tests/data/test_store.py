"""What lives on disk behaves as the tuple of the same values would, and memory does not grow with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import store
from tunesmith.data.layout import plain_row
from tunesmith.data.store import Codec, Places, Stored, join, some, stored_examples, stored_ledger, stored_rows
from tunesmith.errors import FolderError
from tunesmith.types import Comparison, Conversation, Example, LedgerEntry, Message, Row

CALL = Message(role="assistant", content="", tool_calls=({"function": {"name": "f", "arguments": {"x": [1, 2.5]}}},))
ROWS: tuple[Row, ...] = (
    plain_row("a", "é 北京 😀\n", "rows.jsonl:1", {"nested": {"list": [1, None, 0.1]}, "n": 10**30}),
    Conversation(messages=(Message(role="user", content="q"), CALL), id="2", source="r:2", tools=({"name": "f"},)),
    Conversation(messages=(), text="plain", id="3", source="r:3"),
    Comparison(
        prompt=(Message(role="user", content="q"),), chosen=CALL, rejected=CALL, id="4", source="r:4", rater="x"
    ),
)


@pytest.fixture(scope="module", params=[0, store.KEPT_BYTES], ids=["read back", "kept"], autouse=True)
def _kept(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "KEPT_BYTES", request.param)
        yield


def texts(*values: str) -> Stored[str]:
    return Stored(Codec(str.encode, bytes.decode), values)


def test_rows_come_back_as_they_were() -> None:
    assert tuple(stored_rows(ROWS)) == ROWS


def test_ledger_entries_come_back_as_they_were() -> None:
    entries = [LedgerEntry(source="r:1", id="1", action="flagged", reason="why", detail="ü")]
    assert list(stored_ledger(entries)) == entries


def test_examples_come_back_bit_for_bit() -> None:
    draw = np.random.default_rng(0)
    given = Example(
        tokens=draw.integers(0, 2**31, 50),
        weights=draw.random(50, np.float32),
        id="7/1",
        extra={"reward": np.ones(50, np.float32)},
    )
    empty = Example(tokens=np.empty(0, np.int64), weights=np.empty(0, np.float32), id="")
    for before, after in zip([given, empty], stored_examples([given, empty]), strict=True):
        assert (after.id, after.extra.keys()) == (before.id, before.extra.keys())
        for mine, theirs in zip(
            [after.tokens, after.weights, *after.extra.values()],
            [before.tokens, before.weights, *before.extra.values()],
            strict=True,
        ):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)


@settings(max_examples=50)
@given(st.lists(st.text(max_size=5), max_size=8), st.slices(8), st.integers(-9, 8))
def test_a_sequence_on_disk_is_indexed_and_sliced_as_a_tuple(values: list[str], part: slice, index: int) -> None:
    stored, plain = texts(*values), tuple(values)
    assert stored == plain
    assert stored[part] == plain[part]
    assert join(stored[:3], stored[3:]) == plain
    if -len(plain) <= index < len(plain):
        assert stored[index] == plain[index]
    else:
        with pytest.raises(IndexError):
            stored[index]


def test_values_added_after_a_read_are_read_too() -> None:
    stored = texts("a")
    assert list(stored) == ["a"]
    stored.append("b")
    assert stored[-1] == "b"


def test_a_view_keeps_its_order_until_it_is_restored() -> None:
    view = some(texts(*"abcdef"), [4, 1, 3, 0])
    assert list(view) == ["e", "b", "d", "a"]
    assert list(view.only([0, 1, 3])) == ["e", "b", "a"]
    assert list(view.only([0, 1, 3]).restored()) == ["a", "b", "e"]


def test_two_processes_read_one_file_without_disturbing_each_other() -> None:
    stored = texts(*(f"{number:04}" for number in range(2000)))
    assert stored[0] == "0000"
    child = os.fork()
    wrong = [number for number in range(2000) if stored[number] != f"{number:04}"]
    if not child:
        os._exit(len(wrong) > 0)
    assert not wrong
    assert os.waitpid(child, 0)[1] == 0


def test_a_full_disk_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    full = Path("/dev/full").open("wb+", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(store.tempfile, "TemporaryFile", lambda buffering: full)
    with pytest.raises(FolderError, match="the disk is full"):
        texts("a")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=2), st.booleans()), max_size=100))
def test_places_are_a_dictionary(steps: list[tuple[str, bool]]) -> None:
    places, plain = Places(), {}
    for place, (text, sets) in enumerate(steps):
        assert places[text] == plain.get(text, -1)
        if sets:
            places[text] = plain[text] = place
        else:
            assert places.setdefault(text, place) == plain.setdefault(text, place)
    assert len(places) == len(plain)


def test_a_full_dictionary_grows_and_forgets_nothing() -> None:
    places = Places()
    for number in range(5000):
        places[str(number)] = number
    assert [places[str(number)] for number in range(5001)] == [*range(5000), -1]
