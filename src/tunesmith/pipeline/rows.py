"""From files to curated rows and their tokens: made once, and found again while files, settings and code are the same.

What was made of many rows is kept in the cache under a hash of all that it depends on, so that a resumed run, or the
next one with another learning rate, need not read, compare and tokenise them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeGuard, cast

import numpy as np
from jaxtyping import Int

from .. import __version__, texts
from ..data import store
from ..data.counts import Counted, Counts, counts
from ..data.curate import SPLITS, Census, SplitCount, census, curate, drop_overlong
from ..data.layout import is_prompt_only
from ..data.read import read
from ..data.render import render
from ..data.spelled import spelled
from ..data.split import split
from ..data.store import EXAMPLES, LEDGER, ROWS, some, stored_examples
from ..errors import DataError, FolderError, RecipeError
from ..folder import (
    cache_folder,
    manifest_problem,
    read_json,
    sha256_file,
    storage_errors,
    write_json,
    write_manifest,
    written_aside,
)
from ..model.load import Vocabulary
from ..recipe import DataSpec
from ..screen import Screen
from ..types import Conversation, Example, LedgerEntry, Row

WORTH_KEEPING_ROWS = 2000
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow", "datasketch")
MOST_KEPT = 8  # prepared data sets in the cache; the one not used for longest goes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """One split's rows and their examples, `parts[i]` of row i, in order."""

    rows: Sequence[Conversation]
    examples: Counted
    parts: Int[np.ndarray, "rows"]
    longest_answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """Every split's rows, the count and ledger of what was left out, and what the user should know of the splitting."""

    splits: Mapping[str, Rendered]
    census: Census
    ledger: Sequence[LedgerEntry]
    note: str


def curated(spec: DataSpec, vocabulary: Vocabulary, screen: Screen) -> Curated:
    """Read, split, curate and render, or find that done before. Raises DataError that names file and line."""
    name = _name(spec, vocabulary)
    kept = cache_folder() / "data" / name
    if name and _is_whole(kept):
        with suppress(FolderError):  # another process may have just replaced it
            found = _found(kept)
            screen.line(f"rows and tokens as prepared before: {kept}")
            return found
    made = _made(spec, vocabulary)
    # A file that was changed while it was read is not what its hash says.
    if made.census.total.read >= WORTH_KEEPING_ROWS and name and name == _name(spec, vocabulary):
        try:
            _keep(made, kept)
        except FolderError as error:
            screen.warn(f"the prepared rows are not kept for another time: {error.what}")
    return made


def conversations(rows: Sequence[Row]) -> Sequence[Conversation]:
    """Rows that supervised tuning can use. Raises RecipeError for preference pairs, DataError for prompts alone."""
    if not _all_conversations(rows):
        raise RecipeError(
            "these rows are preference pairs, and method sft imitates single answers",
            where="method",
            fix="Give prompt and completion columns.",
        )
    silent = next((row for row in rows if is_prompt_only(row)), None)
    if silent is not None:
        fix = "Give a completion column, or let a policy write the answers (method ppo or grpo)."
        raise DataError("the row has a prompt and no answer to imitate", where=silent.source, fix=fix)
    return rows


def _all_conversations(rows: Sequence[Row]) -> TypeGuard[Sequence[Conversation]]:
    return all(isinstance(row, Conversation) for row in rows)


def answer_tokens(example: Example) -> int:
    """Tokens of the last answer, end of turn included."""
    return len(example.tokens) - 1 - int(np.flatnonzero(example.weights == 0)[-1])


# Made


def _made(spec: DataSpec, vocabulary: Vocabulary) -> Curated:
    whole = split(read(spec.train, spec), spec)
    kept, ledger = curate(whole, spec)
    limit = min(spec.max_tokens or vocabulary.context_tokens, vocabulary.context_tokens)
    found: dict[str, Rendered] = {}
    for name in SPLITS:
        found[name], entries = _rendered(conversations(getattr(kept, name)), vocabulary, limit, spec)
        ledger.extend(entries)
    train, valid, test = (found[name].rows for name in SPLITS)
    counted = census(whole, replace(whole, train=train, valid=valid, test=test), ledger)
    return Curated(splits=found, census=counted, ledger=ledger, note=whole.note)


def _rendered(
    rows: Sequence[Conversation], vocabulary: Vocabulary, limit: int, spec: DataSpec
) -> tuple[Rendered, Sequence[LedgerEntry]]:
    """Rows within the limit with their examples; ledger entries of the others, and of what spells special tokens."""
    examples = stored_examples()
    parts, lengths, answers = array("i"), array("i"), array("i")
    for row in rows:
        made = render(row, vocabulary.tokenizer, vocabulary.eos_ids)
        examples.extend(made)
        parts.append(len(made))
        lengths.append(max(len(example.tokens) for example in made))
        answers.append(answer_tokens(made[-1]) if row.prompt else 0)
    kept, entries = drop_overlong(rows, lengths, limit, spec.overlong)
    entries.extend(spelled(kept, vocabulary.tokenizer))
    fits = np.array(lengths) <= limit
    short = some(examples, np.flatnonzero(np.repeat(fits, parts)))
    found = Rendered(
        rows=kept,
        examples=Counted(short, counts(short)),
        parts=np.array(parts)[fits],
        longest_answer_tokens=int(np.array(answers)[fits].max(initial=0)),
    )
    return found, entries


# Kept


def _name(spec: DataSpec, vocabulary: Vocabulary) -> str:
    """A hash of all that the result depends on; empty where that is more than files, settings and code.

    Rows from elsewhere may change there, and a template that writes the date changes by itself.
    """
    files = [name for name in (spec.train, spec.valid, spec.test) if isinstance(name, str)]
    template = str(vocabulary.tokenizer.chat_template)
    if not all(Path(name).is_file() for name in files) or "strftime" in template:
        return ""
    of_base = [path for path in sorted(vocabulary.folder.iterdir()) if path.suffix not in WEIGHTS and path.is_file()]
    facts = [
        spec.model_dump(mode="json", exclude={"rehearse"}),
        [sha256_file(Path(name)) for name in files],
        [[path.name, sha256_file(path)] for path in of_base],
        [template, vocabulary.eos_ids, vocabulary.context_tokens],
        _code(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _code() -> list[str]:
    """Versions, and a hash of each file that has a say in what becomes of a row."""
    return [
        __version__,
        platform.python_version(),
        *map(version, LIBRARIES),
        *map(sha256_file, map(Path, [__file__, texts.__file__, *sorted(Path(store.__file__).parent.glob("*.py"))])),
    ]


def _keep(made: Curated, target: Path) -> None:
    """Write it as a folder that only its owner may read. Raises FolderError, and then nothing is left."""
    if _is_whole(target):
        return
    with written_aside(target) as folder:
        folder.chmod(0o700)
        LEDGER.write(made.ledger, folder / "ledger")
        for name, part in made.splits.items():
            ROWS.write(part.rows, folder / f"{name}-rows")
            EXAMPLES.write(part.examples, folder / f"{name}-examples")
            np.save(folder / f"{name}-parts.npy", part.parts, allow_pickle=False)
            np.save(folder / f"{name}-counts.npy", np.stack(part.examples.counts), allow_pickle=False)
        answers = {name: part.longest_answer_tokens for name, part in made.splits.items()}
        split_counts = asdict(made.census)["splits"]
        write_json(folder / "facts.json", {"census": split_counts, "note": made.note, "longest_answer_tokens": answers})
        write_manifest(folder)
    with storage_errors(target.parent):
        whole = [path for path in target.parent.iterdir() if not path.name.startswith(".")]
        for old in sorted(whole, key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    return folder.is_dir() and not manifest_problem(folder, hashes=False)


def _found(folder: Path) -> Curated:
    """What was kept, marked as used now. Raises FolderError where it cannot be read."""
    facts = read_json(folder / "facts.json")
    with storage_errors(folder):
        parts = {name: np.load(folder / f"{name}-parts.npy", allow_pickle=False) for name in SPLITS}
        known = {name: Counts(*np.load(folder / f"{name}-counts.npy", allow_pickle=False)) for name in SPLITS}
    with suppress(OSError):  # another's cache may be read, if not written
        os.utime(folder)
    splits = {
        name: Rendered(
            rows=cast("Sequence[Conversation]", ROWS.read(folder / f"{name}-rows")),
            examples=Counted(EXAMPLES.read(folder / f"{name}-examples"), known[name]),
            parts=parts[name],
            longest_answer_tokens=longest,
        )
        for name, longest in facts["longest_answer_tokens"].items()
    }
    counted = Census(splits={name: SplitCount(**count) for name, count in facts["census"].items()})
    return Curated(splits=splits, census=counted, ledger=LEDGER.read(folder / "ledger"), note=facts["note"])
