"""The run folder: where everything a run makes lives, and how it gets there whole.

A reader never sees half a file: files and folders are written aside, flushed to the disk and renamed. Tables that grow
(`metrics.jsonl`, `ledger.jsonl`) are appended line by line, and a last line torn by a crash is dropped.
No torch here: reports, labelling and serving read run folders without it.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError

from .errors import FolderError

MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """One run on the disk: the only interface between training, report, serving and jobs."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe, as YAML with every key; null where `plan` has what was derived."""
        return self.path / "recipe.yaml"

    @property
    def ledger(self) -> Path:
        """One line per dropped, cut or flagged row."""
        return self.path / "ledger.jsonl"

    @property
    def plan(self) -> Path:
        """Derived values with their reasons."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One line per optimizer step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folders of weights and optimizer state, each with its manifest."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The LoRA adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The fully tuned model as a transformers folder."""
        return self.path / "model"

    def handed_over(self, update: str) -> Path:
        """What training an update leaves: a model or an adapter."""
        return {"full": self.model, "lora": self.adapter}.get(update, self.path / update)

    def answers(self, arm: str) -> Path:
        """Every prompt, answer and score of one arm. Raises ValueError for an arm that is not a plain name."""
        if not arm or arm.startswith(".") or set(arm) & set("/\\\0"):
            raise ValueError(f"not the name of an arm: {arm!r}")
        return self.path / "answers" / f"{arm}.jsonl"

    @property
    def results(self) -> Path:
        """The decision and every number behind it."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the process that works in this folder; names its pid."""
        return self.path / ".lock"


def cache_folder() -> Path:
    """Where what is downloaded or converted once is kept: $TUNESMITH_CACHE, or tunesmith/ in the user's cache."""
    if own := os.environ.get("TUNESMITH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"


def is_run_folder(path: Path) -> bool:
    """Whether `path` is a folder that a run made. Raises FolderError where nobody may look."""
    with storage_errors(path):
        return RunFolder(path=path).recipe.is_file()


def only_begun(folder: RunFolder) -> bool:
    """Whether the run wrote down what it was going to do, and nothing yet that took work."""
    names = {child.name for child in folder.path.iterdir()}
    begun = {p.name for p in (folder.recipe, folder.ledger, folder.plan, folder.lock)}
    return folder.ledger.name in names and names <= begun


def open_run(path: Path, recipe_text: str) -> RunFolder:
    """Create the run folder, or re-open it if it was made by the same recipe (`out` may differ).

    A folder in which nothing has been measured yet is taken over by a changed recipe. Call it on one rank, before
    `locked`. Raises FolderError if another run holds the folder, if it belongs to another
    recipe (with the first keys that differ), if it holds foreign files, or if it cannot be written.
    """
    folder = RunFolder(path=path)
    with storage_errors(path):
        if path.exists() and not is_run_folder(path) and any(not _is_ours(child) for child in path.iterdir()):
            raise FolderError("holds files of something else", where=str(path), fix="Choose another `out`.")
        path.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            sweep(path)
            if folder.recipe.exists() and not only_begun(folder):
                _same_recipe(folder, recipe_text)
            else:
                write_text(folder.recipe, recipe_text)
    return folder


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder alone. Raises FolderError that names the process which already does.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    with storage_errors(folder.lock):
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            fix = "Wait for it to end, stop it, or choose another `out`."
            raise FolderError(f"in use by process {holder}", where=str(folder.path), fix=fix) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file in one step: after a crash it holds the old content or the new. Raises FolderError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            with aside.open("xb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


def rename_file(aside: Path, path: Path) -> None:
    """Let a finished file take the place of another in one step, flushed to the disk. Raises FolderError."""
    with storage_errors(path):
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_bytes` of JSON. Dataclasses, numpy values and paths are understood; NaN and infinity become null."""
    write_text(path, json.dumps(_plain(value), ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises FolderError if it is absent or damaged."""
    with storage_errors(path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise FolderError(f"damaged: {error}", where=str(path), fix="Delete the file and run again.") from None


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """`write_bytes` of one JSON line per row, one after the other: the rows need not fit in memory."""
    write_bytes(path, (json.dumps(_plain(row), ensure_ascii=False).encode() + b"\n" for row in rows))


def append_jsonl(path: Path, *rows: object) -> None:
    """Add one JSON line per row, after cutting off a last line that a crash tore. Raises FolderError."""
    lines = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _cut_torn_line(file)
            file.write(lines.encode("utf-8"))


def read_jsonl(path: Path) -> list[Any]:
    """Every whole line of a JSONL file, none if there is no file. Raises FolderError naming a damaged line."""
    if not path.exists():
        return []
    with storage_errors(path):
        *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            fix = "Delete this line, or the file, and run again."
            raise FolderError(f"damaged: {error}", where=f"{path}:{number}", fix=fix) from None
    return rows


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place, flushed to the disk, when the block ends well.

    An older `target` is replaced. If the block raises, nothing is left behind. Raises FolderError.
    """
    aside = _aside(target)
    with storage_errors(target):
        aside.mkdir(parents=True)
        try:
            yield aside
            for child in [*aside.rglob("*"), aside]:
                sync(child)
            if target.exists():
                old = _aside(target)
                target.rename(old)
                aside.rename(target)
                shutil.rmtree(old)
            else:
                aside.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises FolderError if it cannot be read."""
    with storage_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size in bytes and SHA-256 of every other file below `folder`."""
    files = {
        child.relative_to(folder).as_posix(): {"bytes": child.stat().st_size, "sha256": sha256_file(child)}
        for child in sorted(folder.rglob("*"))
        if child.is_file() and child != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": 1, "files": files})


def manifest_problem(folder: Path, *, hashes: bool = True) -> str:
    """What differs from the folder's manifest, in words; empty if every file is as it was written.

    Without `hashes` only names and sizes are compared, which takes no time for gigabytes of weights.
    """
    try:
        files: Mapping[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, wanted in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != wanted["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"
            if hashes and sha256_file(file) != wanted["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FolderError):
        return f"{MANIFEST} is missing or damaged"
    return ""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, or of safetensors in it, into a FolderError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number is None and isinstance(error, SafetensorError):
            raise
        reason = os.strerror(number) if number else str(error)
        if number in FULL:
            fix = "Free some space and run again; a run goes on from its last checkpoint."
            raise FolderError(f"the disk is full ({reason})", where=str(path), fix=fix) from error
        if number in _REFUSED:
            fix = "Choose a folder that you may write to (`out`, or $TUNESMITH_CACHE), or change the permissions."
            raise FolderError(f"may not be read or written ({reason})", where=str(path), fix=fix) from error
        fix = "Check that the path exists and that nothing stands in its way."
        raise FolderError(f"cannot be read or written ({reason})", where=str(path), fix=fix) from error


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number, which safetensors tells in words only; None where the system was not the cause."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _same_recipe(folder: RunFolder, recipe_text: str) -> None:
    """Raise FolderError unless the folder's recipe equals `recipe_text` in every key but `out`."""
    try:
        old, new = (_flat(yaml.safe_load(text)) for text in (folder.recipe.read_text("utf-8"), recipe_text))
    except (yaml.YAMLError, UnicodeDecodeError):
        fix = "Delete the folder or choose another `out`."
        raise FolderError("the saved recipe is damaged", where=str(folder.recipe), fix=fix) from None
    keys = [key for key in {**new, **old} if key != "out" and old.get(key) != new.get(key)]
    if keys:
        changes = [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys[:3]]
        more = [f"and {len(keys) - 3} more"] if len(keys) > 3 else []
        what = "belongs to another recipe: " + "; ".join(changes + more)
        raise FolderError(what, where=str(folder.path), fix="Choose another `out`, or delete this folder.")


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one mapping of dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {name: leaf for key, child in value.items() for name, leaf in _flat(child, f"{prefix}{key}.").items()}


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _aside(path: Path) -> Path:
    """A name in the same folder, hence on the same disk, that nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _is_ours(path: Path) -> bool:
    """Whether a crash before the recipe was written may have left this file."""
    return path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".tmp"))


def sweep(folder: Path) -> None:
    """Delete what a killed process was writing aside. Only under the lock."""
    for child in folder.glob(".*.tmp"):
        shutil.rmtree(child) if child.is_dir() else child.unlink(missing_ok=True)


def _cut_torn_line(file: Any) -> None:
    """Truncate an open file to its last newline."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    if end and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
