"""Prepared rows are found again while nothing that they depend on has changed, and never otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tunesmith.folder import cache_folder
from tunesmith.model.load import Vocabulary, load_vocabulary
from tunesmith.pipeline import rows
from tunesmith.pipeline.rows import Curated, curated
from tunesmith.recipe import DataSpec
from tunesmith.screen import Screen


@pytest.fixture
def vocabulary(tiny_model_folder: Path) -> Vocabulary:
    return load_vocabulary(str(tiny_model_folder))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSpec:
    """Forty questions, one of them twice, in a file of their own; the cache is empty, and takes them."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "WORTH_KEEPING_ROWS", 1)
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n} {chr(97 + n % 26) * 9}", "completion": f"a {n}"} for n in [*range(40), 7]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSpec(train=str(file), max_tokens=200, overlong="drop")


def kept() -> list[Path]:
    return sorted((cache_folder() / "data").iterdir())


def same(a: Curated, b: Curated) -> bool:
    for name, mine in a.splits.items():
        theirs = b.splits[name]
        assert mine.rows == theirs.rows
        assert np.array_equal(mine.parts, theirs.parts)
        assert np.array_equal(mine.examples.counts, theirs.examples.counts)
        assert mine.examples.counts.tokens.tolist() == [len(example.tokens) for example in mine.examples]
        assert mine.longest_answer_tokens == theirs.longest_answer_tokens
        for one, other in zip(mine.examples, theirs.examples, strict=True):
            assert (one.id, one.tokens.tolist(), one.weights.tolist()) == (
                other.id,
                other.tokens.tolist(),
                other.weights.tolist(),
            )
    return (a.census, list(a.ledger), a.note) == (b.census, list(b.ledger), b.note)


def test_what_was_prepared_before_is_found_as_it_was_and_only_its_owner_may_read_it(
    spec: DataSpec, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    made = curated(spec, vocabulary, Screen(quiet=True))
    (folder,) = kept()
    assert folder.stat().st_mode & 0o077 == 0
    found = curated(spec, vocabulary, Screen())
    assert f"as prepared before: {folder}" in " ".join(capsys.readouterr().err.split())
    assert same(made, found)
    assert [entry.reason for entry in found.ledger] == ["exact duplicate"]


@pytest.mark.parametrize("change", ["file", "seed", "template", "tokenizer", "context", "library", "code"])
def test_whatever_has_a_say_in_the_rows_makes_them_anew(
    change: str, spec: DataSpec, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    curated(spec, vocabulary, Screen(quiet=True))
    files = vocabulary.folder / "tokenizer_config.json"
    before = files.read_bytes()
    match change:
        case "file":
            with Path(spec.train).open("a") as file:
                file.write('{"prompt": "one more", "completion": "yes"}\n')
        case "seed":
            spec = spec.model_copy(update={"seed": 1})
        case "template":
            vocabulary.tokenizer.chat_template = str(vocabulary.tokenizer.chat_template).replace("tiny", "small")
        case "tokenizer":
            files.write_bytes(before + b" ")
        case "context":
            vocabulary = replace(vocabulary, context_tokens=300)
        case "library":
            rows._code.cache_clear()
            monkeypatch.setattr(rows, "version", lambda name: "another")
        case _:
            monkeypatch.setattr(rows, "_code", lambda: ["another version"])
    try:
        curated(spec, vocabulary, Screen(quiet=True))
    finally:
        files.write_bytes(before)
        if change == "library":
            rows._code.cache_clear()
    assert len(kept()) == 2


def test_another_weight_of_rehearsal_finds_the_same_rows(spec: DataSpec, vocabulary: Vocabulary) -> None:
    curated(spec, vocabulary, Screen(quiet=True))
    curated(spec.model_copy(update={"rehearse": 0.0}), vocabulary, Screen(quiet=True))
    assert len(kept()) == 1


def test_a_damaged_folder_is_made_anew(spec: DataSpec, vocabulary: Vocabulary) -> None:
    made = curated(spec, vocabulary, Screen(quiet=True))
    (folder,) = kept()
    (folder / "train-rows.bin").write_bytes(b"")
    assert same(made, curated(spec, vocabulary, Screen(quiet=True)))
    assert (folder / "train-rows.bin").stat().st_size


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(
    spec: DataSpec, vocabulary: Vocabulary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert curated(spec, vocabulary, Screen()).census.total.kept == 40
    assert "not kept for another time" in " ".join(capsys.readouterr().err.split())


def test_the_cache_holds_a_few_sets_and_those_used_last(spec: DataSpec, vocabulary: Vocabulary) -> None:
    for seed in range(rows.MOST_KEPT):
        curated(spec.model_copy(update={"seed": seed}), vocabulary, Screen(quiet=True))
    first = kept()
    curated(spec, vocabulary, Screen(quiet=True))
    used = max(first, key=lambda folder: folder.stat().st_mtime_ns)
    curated(spec.model_copy(update={"seed": 99}), vocabulary, Screen(quiet=True))
    assert len(kept()) == rows.MOST_KEPT
    assert used in kept()


def test_a_template_that_writes_the_date_is_rendered_every_time(spec: DataSpec, vocabulary: Vocabulary) -> None:
    vocabulary.tokenizer.chat_template = "{{ strftime_now('%d') }}" + str(vocabulary.tokenizer.chat_template)
    curated(spec, vocabulary, Screen(quiet=True))
    assert not (cache_folder() / "data").exists()


def test_few_rows_and_rows_from_elsewhere_than_a_file_are_not_kept(
    spec: DataSpec, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    curated(DataSpec(train="builtin:legal_citations", rows=60), vocabulary, Screen(quiet=True))
    monkeypatch.setattr(rows, "WORTH_KEEPING_ROWS", 2000)
    curated(spec, vocabulary, Screen(quiet=True))
    assert not (cache_folder() / "data").exists()
