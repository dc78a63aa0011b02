"""Fetching: from the index that pip is set up with, once, and only the file that is known."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tunesmith.data.fetch import fetch, indexes
from tunesmith.errors import DataError

CONTENT = b"ratings"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = "Some.Data-1.zip"


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def folder_index(root: Path, content: bytes = CONTENT) -> str:
    page = root / "simple" / "some-data" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../files/{FILE}#sha256=0">{FILE}</a><a href="../other.zip">other</a>')
    (root / "files").mkdir()
    (root / "files" / FILE).write_bytes(content)
    return (root / "simple").as_uri()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that answers in JSON and asks for a password; its address and the requests it got."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:secret word").decode()
            page = json.dumps({"files": [{"filename": FILE, "url": f"/files/{FILE}"}]}).encode()
            body = page if self.path == "/simple/some-data/" else CONTENT
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(body if known else b"")

        def log_message(self, *_: object) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}/simple", asked
    httpd.shutdown()
    httpd.server_close()


def test_a_file_is_fetched_once_from_a_folder_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", folder_index(tmp_path))
    path = fetch("Some_Data", FILE, SHA256)
    assert path.read_bytes() == CONTENT
    (tmp_path / "files" / FILE).unlink()
    assert fetch("Some_Data", FILE, SHA256) == path


def test_a_password_is_used_and_never_shown(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, asked = server
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret%20word@{address}/")
    assert fetch("some.data", FILE, SHA256).read_bytes() == CONTENT
    assert asked == ["/simple/some-data/", f"/files/{FILE}"]
    assert "secret" not in capsys.readouterr().err
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:wrong@{address}/")
    with pytest.raises(DataError, match="Unauthorized") as caught:
        fetch("some.data", FILE, "0")
    assert "wrong" not in str(caught.value)


def test_another_file_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", folder_index(tmp_path, b"something else"))
    with pytest.raises(DataError, match="serves another file"):
        fetch("some-data", FILE, SHA256)
    assert not (tmp_path / "cache" / FILE).exists()


def test_without_an_index_the_message_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        fetch("some-data", FILE, SHA256)
    put = tmp_path / "cache" / FILE
    assert str(put) in caught.value.fix
    put.parent.mkdir()
    put.write_bytes(CONTENT)
    assert fetch("some-data", FILE, SHA256) == put


def test_indexes_are_those_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    assert indexes({}) == ["https://pypi.org/simple"]
    both = {"index-url": "https://a/simple/", "extra-index-url": "https://b\nfile:///c"}
    assert indexes(both) == ["https://a/simple", "https://b", "file:///c"]
    assert indexes({"no-index": "true"}) == []
