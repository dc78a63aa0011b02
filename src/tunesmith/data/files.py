"""Records out of files and the hub: each is `(file:line, columns)`, streamed, and every defect is a DataError.

Bytes are decoded here and nowhere else, so this file decides what counts as damaged: invalid UTF-8, NUL bytes, lone
surrogates, duplicate keys, nesting too deep to parse. What the columns mean is the business of layout.py.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BufferedIOBase, BufferedReader
from pathlib import Path

from ..errors import DataError

Record = tuple[str, dict[str, object]]

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
_BATCH_ROWS = 1024
_LFS = b"version https://git-lfs.github.com/"
# Far above what tool calls need, far below where Python's own JSON writer gives up.
_NESTING = 64


def records(source: str) -> Iterator[Record]:
    """Stream a file's or hub set's records as (`file:line`, columns). Raises DataError; never any other error."""
    path = Path(source)
    if "\0" in source:
        raise DataError("the name holds a NUL character", where=repr(source), fix="Give the path of a data file.")
    if path.is_file():
        yield from _file(path, source)
    elif path.suffix.casefold() not in (*FORMATS, ".gz") and _HUB_ID.fullmatch(source):
        yield from _hub(source)
    else:
        what = "is a folder" if path.is_dir() else "no such file"
        looked = "" if path.is_absolute() else f"Looked for {path.absolute()}, from where the command was called. "
        fix = f"{looked}Give a .jsonl .json .csv .parquet file, a hub id, or builtin:NAME."
        raise DataError(what, where=source, fix=fix)


def _file(path: Path, source: str) -> Iterator[Record]:
    name = path.name.casefold().removesuffix(".gz")
    readers: dict[str, Callable[[BufferedIOBase, str], Iterator[Record]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(Path(name).suffix)
    if reader is None:
        fix = f"Use {', '.join(FORMATS)}, each also with .gz; rename the file if its name is wrong."
        raise DataError("the file's format is not known from its name", where=source, fix=fix)
    try:
        with _opened(path) as stream:
            begins = stream.read(len(_LFS))
            if not begins:
                raise DataError("the file is empty", where=source, fix="Give a file with at least one row.")
            if begins == _LFS:
                fix = "Fetch the file with `git lfs pull`."
                raise DataError("this is Git LFS's note of a file, not the file", where=source, fix=fix)
            stream.seek(0)
            yield from reader(stream, source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"the gzip data is damaged ({error})", where=source, fix="Copy or compress it again.") from None
    except OSError as error:
        raise DataError(f"cannot read the file ({error})", where=source, fix="Check disk and permissions.") from None


def _opened(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path) if path.suffix.casefold() == ".gz" else path.open("rb")


def _jsonl(stream: BufferedIOBase, source: str) -> Iterator[Record]:
    for number, line in _lines(stream, source):
        if line.strip():
            where = f"{source}:{number}"
            if line.strip() in ("{", "["):
                fix = "Write each row on one line, as `jq -c .` does, or name a file that is one JSON list .json."
                raise DataError("a row goes on over several lines", where=where, fix=fix)
            yield where, _object(_load(line.strip(), source, number), where)


def _json(stream: BufferedIOBase, source: str) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(stream, source))
    if re.match(r"\s*\{[^\n]*\}\s*\n\s*\{", text):
        # Many files named .json hold one object per line.
        stream.seek(0)
        yield from _jsonl(stream, source)
        return
    value = _load(text, source, 1)
    if isinstance(value, dict):
        nested = [value[key] for key in ("data", "rows", "examples", "train") if isinstance(value.get(key), list)]
        value = nested[0] if nested else [value]
    if not isinstance(value, list):
        raise DataError("the file holds no list of rows", where=source, fix='Write [{"prompt": ...}, ...].')
    for number, row in enumerate(value, start=1):
        yield f"{source}:{number}", _object(row, f"{source}:{number}")


def _csv(stream: BufferedIOBase, source: str) -> Iterator[Record]:
    reader = csv.reader((line for _, line in _lines(stream, source)), strict=True)
    start, header = 1, None
    try:
        for cells in reader:
            where, start = f"{source}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, where)
                continue
            if len(cells) != len(header):
                fix = "Put quotes around cells that hold commas, quotes or line breaks."
                raise DataError(f"the row has {len(cells)} cells, the header {len(header)}", where=where, fix=fix)
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        fix = "Check quotes and line ends on this line, or save the data as .jsonl."
        raise DataError(f"not valid CSV: {error}", where=f"{source}:{start}", fix=fix) from None


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the header names {twice!r} twice", where=where, fix="Give each column its own name.")
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise DataError("the cells are not separated by commas", where=where, fix="Save the file with commas.")
    return header


def _parquet(stream: BufferedIOBase, source: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # A gzipped file has no cheap random access, so it is unpacked in memory; a plain one is read by batches.
        plain = stream if isinstance(stream, BufferedReader) else pa.BufferReader(stream.read())
        for batch in pq.ParquetFile(plain).iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{source}:{number}", _clean(row, f"{source}:{number}")
    except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError, KeyError) as error:
        problem = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fix = "Write the file again."
        raise DataError(f"not a readable parquet file: {problem}", where=f"{source}:{number + 1}", fix=fix) from None


def _hub(source: str) -> Iterator[Record]:
    """`owner/name`, `owner/name:split` or `owner/name:config:split`, streamed."""
    from datasets import load_dataset

    name, *rest = source.split(":")
    config, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
    try:
        rows = iter(load_dataset(name, config, split=split, streaming=True))
    except Exception as error:  # the hub client raises errors of many libraries
        raise _hub_error(source, error) from None
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(f"{source}:{number}", error) from None
        yield f"{source}:{number}", _clean(dict(row), f"{source}:{number}")


def _hub_error(where: str, error: Exception) -> DataError:
    problem = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    fix = "Check the id (owner/name:config:split) and the network, or give a file that exists."
    return DataError(f"not a file, and not readable as a hub data set: {problem}", where=where, fix=fix)


def _lines(stream: BufferedIOBase, source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that an error can name its line; a byte-order mark is skipped."""
    for number, raw in enumerate(stream, start=1):
        if number == 1:
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError("the file is UTF-16", where=f"{source}:1", fix="Save it as UTF-8.")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            raise DataError("the line holds a NUL byte", where=f"{source}:{number}", fix="Is this a text file?")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line is not UTF-8"
            raise DataError(what, where=f"{source}:{number}", fix="Save the file as UTF-8.") from None


def _load(text: str, source: str, line: int) -> object:
    """Parse JSON that starts at `line`. NaN and Infinity, which pandas writes for missing numbers, become null."""
    where = f"{source}:{line}"
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_twins(pairs, where), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        what = f"not valid JSON at column {error.colno}: {error.msg}"
        fix = "Mend the row; a tool such as jq shows where it breaks."
        raise DataError(what, where=f"{source}:{line + error.lineno - 1}", fix=fix) from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise DataError(f"a number cannot be read: {error}", where=where, fix="Write it as text.") from None
    if "\\u" in text or text.count("[") + text.count("{") > _NESTING:
        _check(value, where)
    return value


def _no_twins(pairs: list[tuple[str, object]], where: str) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice!r} stands twice in one object", where=where, fix="Keep one of them.")
    return unique


def _object(value: object, where: str) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    fix = 'Write {"prompt": "...", "completion": "..."}.'
    if isinstance(value, list) and value and isinstance(value[0], dict):
        fix = "If the file is one JSON list of rows, name it .json."
    raise DataError("the row is not an object", where=where, fix=fix)


def _clean(row: dict[str, object], where: str) -> dict[str, object]:
    """Dates, decimals and bytes become text and NaN null, so that every record could have come from JSON.

    Arrow gives each object of a column the fields of all of them, so a null inside one says that it has no such field.
    """
    text = json.dumps(row, default=_as_text)
    plain = json.loads(text, parse_constant=lambda _: None, object_hook=_without_nulls)
    _check(plain, where)
    return {**dict.fromkeys(row), **plain}  # a column that is empty here is a column still


def _as_text(value: object) -> str:
    """Some writers store text as bytes; bytes that are no text, such as an image, are shown as Python does."""
    if isinstance(value, bytes) and b"\0" not in value:
        with suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return str(value)


def _without_nulls(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _check(value: object, where: str) -> None:
    """Refuse deep nesting, and what JSON escapes can smuggle in: NUL characters and half surrogate pairs."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _NESTING:
            raise _too_deep(where)
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, where)
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
        level = below


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise DataError("the text holds a NUL character", where=where, fix="Remove \\u0000 from the row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        fix = "Replace the lone \\ud8xx escape; the text was probably cut inside an emoji."
        raise DataError("the text holds half a surrogate pair", where=where, fix=fix) from None


def _too_deep(where: str) -> DataError:
    return DataError(f"the JSON is nested more than {_NESTING} levels deep", where=where, fix="Flatten the row.")
