"""The store: each choice is there exactly once, whatever is killed, sent twice or done by two people at once."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import FolderError
from tunesmith.serve.choices import (
    FILE_NAME,
    Choice,
    ConflictError,
    Pair,
    add_choice,
    add_drawn,
    add_pairs,
    keep_note,
    last_choice,
    opened,
    read_choices,
    read_drawn,
    read_pairs,
    undo_choice,
)
from tunesmith.types import Message

MakePair = Callable[..., Pair]
Fork = Callable[[Callable[[], object]], int]


def choice(pair: str, **changes: Any) -> Choice:
    fields = {"id": "1", "rater": "Anna", "repeat": False, "left": "a", "pick": "left", "seconds": 1.5}
    return Choice(**{**fields, "pair": pair, **changes})


def filled(folder: Path, pairs: list[Pair]) -> list[str]:
    with opened(folder, create=True) as store:
        add_pairs(store, pairs)
    return [pair.id for pair in pairs]


def test_a_choice_sent_twice_counts_once(tmp_path: Path, pair: MakePair) -> None:
    (name,) = filled(tmp_path, [pair(1)])
    with opened(tmp_path) as store:
        assert add_choice(store, choice(name))
        assert not add_choice(store, choice(name))
        (found,) = read_choices(store)
    assert found == replace(choice(name), time=found.time)
    assert found.time.endswith("+00:00")


def test_an_id_used_for_another_choice_is_refused(tmp_path: Path, pair: MakePair) -> None:
    (name,) = filled(tmp_path, [pair(1)])
    with opened(tmp_path) as store:
        add_choice(store, choice(name))
        for other in ({"pick": "right"}, {"rater": "Bob"}, {"repeat": True}):
            with pytest.raises(ConflictError, match="another choice"):
                add_choice(store, choice(name, **other))
        assert len(read_choices(store)) == 1


def test_a_second_choice_of_one_rater_on_one_showing_is_refused(tmp_path: Path, pair: MakePair) -> None:
    (name,) = filled(tmp_path, [pair(1)])
    with opened(tmp_path) as store:
        add_choice(store, choice(name))
        with pytest.raises(ConflictError, match="answered already"):
            add_choice(store, choice(name, id="2"))
        add_choice(store, choice(name, id="3", repeat=True))
        add_choice(store, choice(name, id="4", rater="Bob"))
        assert [found.id for found in read_choices(store)] == ["1", "3", "4"]


def test_an_undone_choice_stays_in_the_record_and_its_pair_can_be_chosen_again(tmp_path: Path, pair: MakePair) -> None:
    (name,) = filled(tmp_path, [pair(1)])
    with opened(tmp_path) as store:
        add_choice(store, choice(name))
        assert undo_choice(store, "Anna", "1")
        assert not undo_choice(store, "Anna", "1")
        assert last_choice(store, "Anna") is None
        assert read_choices(store) == []
        assert not add_choice(store, choice(name))  # a late second copy does not bring it back
        add_choice(store, choice(name, id="2", pick="tie"))
        assert [(found.id, bool(found.undone)) for found in read_choices(store, undone=True)] == [
            ("1", True),
            ("2", False),
        ]


def test_only_ones_own_last_choice_can_be_undone(tmp_path: Path, pair: MakePair) -> None:
    first, second = filled(tmp_path, [pair(1), pair(2)])
    with opened(tmp_path) as store:
        add_choice(store, choice(first))
        add_choice(store, choice(second, id="2"))
        for rater, name in (("Bob", "2"), ("Anna", "1"), ("Anna", "9")):
            with pytest.raises(ConflictError):
                undo_choice(store, rater, name)
        assert len(read_choices(store)) == 2


@pytest.mark.parametrize("acknowledged", [0, 1, 7, 40])
def test_a_process_killed_while_it_writes_loses_and_doubles_nothing(
    acknowledged: int, tmp_path: Path, pair: MakePair, fork: Fork
) -> None:
    names = filled(tmp_path, [pair(number) for number in range(200)])
    reads, writes = os.pipe()

    def work() -> None:
        with opened(tmp_path) as store:
            for number, name in enumerate(names):
                add_choice(store, choice(name, id=str(number)))
                os.write(writes, b".")

    child = fork(work)
    seen = 0
    while seen < acknowledged:
        seen += len(os.read(reads, acknowledged - seen))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writes)
    while part := os.read(reads, 4096):  # what else was acknowledged before the kill
        seen += len(part)
    os.close(reads)
    with opened(tmp_path) as store:
        found = [one.id for one in read_choices(store)]
        # At most one was on the disk and not yet acknowledged.
        assert found in ([str(n) for n in range(seen)], [str(n) for n in range(seen + 1)])
        for number, name in enumerate(names):
            assert add_choice(store, choice(name, id=str(number))) == (str(number) not in found)
        assert [one.pair for one in read_choices(store)] == names


def test_raters_in_several_processes_at_once_lose_and_double_nothing(
    tmp_path: Path, pair: MakePair, fork: Fork
) -> None:
    names = filled(tmp_path, [pair(number) for number in range(25)])

    def work(rater: str) -> Callable[[], None]:
        def choose() -> None:
            with opened(tmp_path) as store:
                for number, name in enumerate(names):
                    one = choice(name, id=f"{rater}{number}", rater=rater)
                    assert add_choice(store, one)
                    assert not add_choice(store, one)

        return choose

    for child in [fork(work(rater)) for rater in ("Anna", "Bob", "Carl")]:
        assert os.waitpid(child, 0)[1] == 0
    with opened(tmp_path) as store:
        found = read_choices(store)
    assert sorted((one.rater, one.pair) for one in found) == sorted(
        (r, name) for r in ("Anna", "Bob", "Carl") for name in names
    )


def test_pairs_are_read_back_as_they_were_and_kept_once(tmp_path: Path, pair: MakePair) -> None:
    turns = (Message(role="system", content="Be kind."), Message(role="user", content="ä\n<b>"))
    call = Message(role="assistant", content="", tool_calls=({"name": "f", "arguments": {"x": 1}},))
    pairs = [pair(1), pair(2, prompt=turns, a=call, model_a="M", gold="b")]
    with opened(tmp_path, create=True) as store:
        assert add_pairs(store, [*pairs, pairs[0]]) == 2
        assert add_pairs(store, pairs) == 0
        assert read_pairs(store) == {one.id: one for one in pairs}


def test_drawn_answers_and_their_pairs_are_kept_together(tmp_path: Path, pair: MakePair) -> None:
    with opened(tmp_path, create=True) as store:
        assert add_drawn(store, "a", {"p": ("text", False)}, []) == 0
        assert add_drawn(store, "b", {"p": ("other", True)}, [pair(1)]) == 1
        assert (read_drawn(store, "a"), read_drawn(store, "b")) == ({"p": ("text", False)}, {"p": ("other", True)})
        assert [keep_note(store, "models", value) for value in ("one", "two")] == ["one", "one"]


def test_a_folder_without_choices_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no pairs have been labelled here"), opened(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["not a database", "another version"])
def test_a_file_that_cannot_be_used_is_one_clear_message(damage: str, tmp_path: Path) -> None:
    if damage == "not a database":
        (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    else:
        with sqlite3.connect(tmp_path / FILE_NAME) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()
    with pytest.raises(FolderError, match=damage), opened(tmp_path):
        pass
