"""Which base a run began from, so that other weights under the same name or path do not go unnoticed.

plan.json keeps a short hash of each of the base's files. It must be cheap for 16 GB, so of a large file of weights only
its size, its header and 64 blocks spread evenly over it are read, some 4 MiB. Fine-tuned, quantised, re-converted and
cut weights differ in nearly every block and are noticed; a change of a few numbers, or of one matrix that is smaller
than the gap between two blocks (a sixty-fourth of the file), may be missed: this guards against mistakes, not against
somebody who wants to deceive.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import ModelError
from ..folder import MANIFEST, RunFolder, read_json, storage_errors

_WEIGHTS = ".safetensors"
_SMALL = {".json", ".jinja", ".model", ".txt"}  # configurations, tokenizer and template; not a README
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
_MOST_HEADER_BYTES = 100 << 20  # as in safetensors itself


def fingerprint(base: Path) -> dict[str, str]:
    """A hash of each file of a plain model folder that loading it reads, by name. Raises FolderError."""
    with storage_errors(base):
        files = [path for path in sorted(base.iterdir()) if path.is_file() and path.name != MANIFEST]
        return {path.name: _hash(path) for path in files if path.suffix in {_WEIGHTS, *_SMALL}}


def base_problem(run: RunFolder, base: Path) -> str:
    """How the folder `base` differs from the base that the run began with, in words; empty if it does not.

    Nothing is known of the base of a run that an earlier version began, and so nothing is said. Raises FolderError.
    """
    began = read_json(run.plan).get("base") if run.plan.is_file() else None
    if not began:
        return ""
    now = fingerprint(base)
    changed = sorted(name for name in {*began, *now} if began.get(name) != now.get(name))
    weights = [name for name in changed if name.endswith(_WEIGHTS)]
    if not changed:
        return ""
    return f"the base has other weights ({weights[0]})" if weights else f"the base has other files ({changed[0]})"


def check_base(run: RunFolder, base: Path) -> None:
    """Raises ModelError where `base` is no longer what the adapter of a run was trained on."""
    if problem := base_problem(run, base):
        fix = f"Put the base's former files there, or delete {run.path} and run its recipe again on the new ones."
        raise ModelError(f"{problem} than those this adapter was trained on", where=str(base), fix=fix)


def _hash(path: Path) -> str:
    """16 hexadecimal digits of a file's size and content: all of it, or samples of weights that are large."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix != _WEIGHTS or size <= _BLOCKS * _BLOCK_BYTES:
            found.update(file.read())
        else:
            header_bytes = int.from_bytes(file.read(8), "little")  # of a damaged file it may be anything
            found.update(file.read(min(header_bytes, _MOST_HEADER_BYTES)))
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
                found.update(file.read(_BLOCK_BYTES))
    return found.hexdigest()[:16]
