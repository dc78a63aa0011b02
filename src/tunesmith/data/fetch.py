"""One file of a package index, fetched once and kept in the cache: for packages that hold data and cannot be installed.

The index is the one that pip is set up with. Its page of links is read (PEP 503 or PEP 691), the named file downloaded
and its hash compared with a known one, whatever the index says. Nothing in it is ever run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from ..errors import DataError
from ..folder import cache_folder, sha256_file, write_bytes

_PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_SECONDS = 60
_MOST_BYTES = 64 << 20


def fetch(project: str, file_name: str, sha256: str) -> Path:
    """The cached file `file_name` of `project`, downloaded if it is not there. Raises DataError where that fails."""
    target = cache_folder() / file_name
    if target.is_file() and sha256_file(target) == sha256:
        return target
    settings = pip_settings()
    wrong = []
    for index in indexes(settings):
        try:
            url = _link(index, project, file_name, settings)
            print(f"Downloading {file_name} from {_shown(url)} (once)", file=sys.stderr)
            data = _read(url, settings)
        except (OSError, ValueError) as error:
            reason = str(error.reason) if isinstance(error, URLError) else str(error)
            wrong.append(f"{_shown(index)}: {reason or type(error).__name__}")
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            write_bytes(target, data)
            return target
        wrong.append(f"{_shown(index)}: serves another file than the one we tested")
    fix = f"Where there is a network, get it from https://pypi.org/project/{project}/#history, and put it at {target}."
    raise DataError(f"cannot be downloaded ({'; '.join(wrong) or 'no index is set'})", where=file_name, fix=fix)


def pip_settings() -> Mapping[str, str]:
    """What pip is set up with, by key; later lines of `pip config list` win, as they do for pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = re.findall(r"^(:env:|global|install|download)\.?([\w-]+)='(.*)'$", done.stdout, re.MULTILINE)
    order = ("global", "install", "download", ":env:")
    return {key: value for _, key, value in sorted(found, key=lambda line: order.index(line[0]))}


def indexes(settings: Mapping[str, str]) -> list[str]:
    """The package indexes to ask, in order."""
    if settings.get("no-index", "").casefold() in ("1", "true", "yes", "on"):
        return []
    main = os.environ.get("PIP_INDEX_URL") or settings.get("index-url") or _PYPI
    return [index.rstrip("/") for index in (main, *settings.get("extra-index-url", "").split())]


def _link(index: str, project: str, file_name: str, settings: Mapping[str, str]) -> str:
    """Where the index keeps the file. Raises OSError or ValueError."""
    page = f"{index}/{re.sub(r'[-_.]+', '-', project).casefold()}/"
    # A folder on the disk has no server that would name its page.
    data = _read(f"{page}index.html" if page.startswith("file:") else page, settings).decode("utf-8")
    if data.lstrip().startswith("{"):
        links = [str(entry["url"]) for entry in json.loads(data)["files"]]
    else:
        reader = _Links()
        reader.feed(data)
        links = reader.found
    for link in links:
        if unquote(urlsplit(link).path).rpartition("/")[2] == file_name:
            return urljoin(page, link).partition("#")[0]
    raise ValueError(f"has no {file_name}")


class _Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _read(url: str, settings: Mapping[str, str]) -> bytes:
    """The bytes at an http, https or file address. Raises OSError or ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"cannot read {parts.scheme or 'bare'} addresses")
    request = Request(_shown(url), headers={"Accept": _ACCEPT})  # noqa: S310
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode('ascii')}")
    trusted = ssl.create_default_context(cafile=settings.get("cert"))
    with urlopen(request, timeout=_SECONDS, context=trusted) as answer:  # noqa: S310
        data: bytes = answer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"sent more than {_MOST_BYTES >> 20} MiB")
    return data


def _shown(url: str) -> str:
    """The address without the name and password that may stand in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
