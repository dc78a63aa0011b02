"""Uploads: a multipart body goes to the disk as it arrives, and is a file of the API once all of it is there.

What is not JSONL at all is refused at once; what is wrong with a single row shows when a job validates the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from ..data.files import records
from ..errors import DataError
from ..folder import rename_file, storage_errors, write_text
from .jobs import Store, new_id, reading, seconds, writing
from .problems import Problem

MOST_FILE_BYTES = 512 * 1024 * 1024  # as at OpenAI
MOST_FIELD_BYTES = 4096
DRAINED = 4  # how many times the limit is read and thrown away, so that a client hears why rather than a broken pipe
PURPOSE, RESULTS = "fine-tune", "fine-tune-results"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One row of the table."""

    number: int
    id: str
    name: str
    purpose: str
    bytes: int
    sha256: str
    created: int


class Form:
    """A multipart body as it arrives: the part called `file` goes to `target`, short fields stay here."""

    def __init__(self, boundary: bytes, target: IO[bytes]) -> None:
        self.target, self.digest = target, hashlib.sha256()
        self.fields: dict[str, bytes] = {}
        self.filename: str | None = None
        self.bytes, self.complete = 0, False
        self._name, self._header, self._value, self._disposition = "", b"", b"", b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add_to_part,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """Take in the next bytes of the body. Raises Problem for a body that is no such form."""
        try:
            self.parser.write(data)
        except MultipartParseError as error:
            raise Problem(400, f"the body is not a multipart form: {error}", code="invalid_form") from None

    def _begin_part(self) -> None:
        self._name, self._disposition = "", b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name in self.fields or (self._name == "file" and self.filename is not None):
            raise Problem(400, f"{self._name[:64]}: is there twice", param=self._name[:64])
        if self._name == "file":
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            self.fields[self._name] = b""

    def _add_to_part(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.bytes += end - start
            self.digest.update(data[start:end])
            self.target.write(data[start:end])
            return
        self.fields[self._name] += data[start:end]
        if len(self.fields) > 16 or len(self.fields[self._name]) > MOST_FIELD_BYTES:
            raise Problem(400, "a field of the form is too long, or there are too many", code="invalid_form")

    def _end(self) -> None:
        self.complete = True


async def take_upload(request: Request, store: Store, most_bytes: int, token: str | None) -> File:
    """Receive a file. Raises Problem, and keeps nothing, where it is too large, cut short or no JSONL."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise Problem(400, "send the file as multipart/form-data, with fields file and purpose", code="invalid_form")
    name = new_id("file")
    aside = store.files / f".{name}.jsonl"
    try:
        with storage_errors(aside), aside.open("xb") as target:
            form = Form(options[b"boundary"], target)
            await _receive(request, form, most_bytes)
        _check(form, aside)
        row = _row(form, name)
        with writing(store) as db:
            if token is not None and (known := _find(store, "token", token)):
                if (known.sha256, known.name) != (row["sha256"], row["name"]):
                    raise Problem(409, "this Idempotency-Key belongs to another upload", code="idempotency_key_reused")
                return known
            rename_file(aside, path_of(store, name))
            db.execute(_INSERT, {**row, "token": token})
        return find_file(store, name)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def find_file(store: Store, name: str, param: str = "file_id") -> File:
    """The file. Raises Problem where there is none."""
    found = _find(store, "id", name)
    if found is None:
        raise Problem(404, "there is no such file", param=param)
    return found


def list_files(store: Store) -> list[File]:
    """All files, the oldest first."""
    with reading(store) as db:
        return [File(**dict(zip(_NAMES, row, strict=True))) for row in db.execute(f"{_SELECT} ORDER BY number")]


def delete_file(store: Store, name: str) -> None:
    """Forget a file; jobs that were made of it have their own. Raises Problem where there is none."""
    path = path_of(store, find_file(store, name).id)
    with writing(store) as db:
        db.execute("DELETE FROM file WHERE id = ?", (name,))
    with storage_errors(path):
        path.unlink(missing_ok=True)


def add_result(store: Store, job: str, lines: Iterable[str]) -> str:
    """The file with a job's losses; the same one each time it is asked for."""
    name = "file-" + job.partition("-")[2]
    text = "".join(f"{line}\n" for line in lines)
    write_text(path_of(store, name), text)
    data = text.encode("utf-8")
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "created": seconds(), "token": None}
    with writing(store) as db:
        db.execute(_INSERT, {"id": name, "name": "step_metrics.csv", "purpose": RESULTS, **facts})
    return name


def path_of(store: Store, name: str) -> Path:
    """Where a file lies."""
    return store.files / f"{name}.jsonl"


def sweep(store: Store) -> None:
    """Make the folder, and delete what a killed server was receiving."""
    with storage_errors(store.files):
        store.files.mkdir(parents=True, exist_ok=True)
        for path in store.files.glob(".*.jsonl"):
            path.unlink(missing_ok=True)


async def _receive(request: Request, form: Form, most_bytes: int) -> None:
    """Read the body to its end; past the limit nothing is kept any more."""
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > most_bytes + MOST_FIELD_BYTES
    read = 0
    with suppress(ClientDisconnect):  # the form is not complete then
        async for data in request.stream():
            read += len(data)
            too_large = too_large or form.bytes > most_bytes
            if not too_large:
                form.write(data)
            elif read > DRAINED * most_bytes:
                break
    if too_large or form.bytes > most_bytes:
        raise Problem(413, f"the file is larger than {most_bytes} bytes", param="file", code="file_too_large")
    if not form.complete:
        raise Problem(400, "the body ends in the middle of the form", code="invalid_form")


def _check(form: Form, aside: Path) -> None:
    """Raise Problem unless the form is a file of rows for fine-tuning."""
    if unknown := set(form.fields) - {"purpose"}:
        name = min(unknown)[:64]
        raise Problem(400, f"{name}: is not a field that this server knows", param=name, code="unknown_parameter")
    if form.fields.get("purpose") != PURPOSE.encode("ascii"):
        raise Problem(400, f"purpose: this server keeps files for {PURPOSE} only", param="purpose")
    if not form.filename:
        raise Problem(400, "file: give a file with its name", param="file")
    try:
        for _ in islice(records(str(aside)), 1):
            pass
    except DataError as error:
        where = error.where.replace(str(aside), _plain(form.filename))
        raise Problem(400, f"{where}: {error.what}. {error.fix}", param="file", code="invalid_jsonl") from None


def _row(form: Form, name: str) -> dict[str, Any]:
    facts = {"bytes": form.bytes, "sha256": form.digest.hexdigest(), "created": seconds()}
    return {"id": name, "name": _plain(form.filename or ""), "purpose": PURPOSE, **facts}


def _plain(name: str) -> str:
    """A file's name without folders and unprintable characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in last if letter.isprintable())[:255] or "rows.jsonl"


_NAMES = ("number", "id", "name", "purpose", "bytes", "sha256", "created")
_SELECT = f"SELECT {', '.join(_NAMES)} FROM file"  # noqa: S608 -- our own words
_INSERT = (
    "INSERT OR IGNORE INTO file (id, name, purpose, bytes, sha256, created, token) "
    "VALUES (:id, :name, :purpose, :bytes, :sha256, :created, :token)"
)


def _find(store: Store, column: str, value: str) -> File | None:
    with reading(store) as db:
        row = db.execute(f"{_SELECT} WHERE {column} = ?", (value,)).fetchone()
    return File(**dict(zip(_NAMES, row, strict=True))) if row else None
