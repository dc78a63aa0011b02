"""A base by its hub id, from a hub of our own: what is asked for, and what is told where it cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tunesmith.errors import ModelError
from tunesmith.model.load import resolve

COMMIT = "0" * 40
PLACE = "import sys; from tunesmith.model.load import load_vocabulary; print(load_vocabulary(sys.argv[1]).folder)"


class Hub:
    """Serves one folder under every id, as the hub's API does, and remembers which files were fetched."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        self.files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.reply(*hub.find(self.path), body=False)

            def do_GET(self) -> None:
                self.reply(*hub.find(self.path, fetch=True), body=True)

            def reply(self, status: int, content: bytes, *, body: bool) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def find(self, path: str, *, fetch: bool = False) -> tuple[int, bytes]:
        if "/tree/" in path:
            sizes = {name: file.stat().st_size for name, file in self.files.items()}
            found = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            return 200, json.dumps(found).encode()
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            return 200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in self.files:
            return 404, b""
        if fetch:
            self.fetched.append(name)
        return 200, self.files[name].read_bytes()


@pytest.fixture
def hub(tiny_model_folder: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "on-the-hub"
    (folder / "original").mkdir(parents=True)
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("consolidated.safetensors", "pytorch_model.bin", "original/params.json", "modeling_own.py"):
        (folder / name).write_bytes(b"for others")
    found = Hub(folder)
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_name_with_a_point_is_a_hub_id_and_only_what_is_read_is_fetched(hub: Hub, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{hub.server.server_port}"
    where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PLACE, "Qwen/Qwen2.5-0.5B-Instruct"],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
    assert not {"consolidated.safetensors", "pytorch_model.bin", "original/params.json", "modeling_own.py"} & set(
        hub.fetched
    )


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("./Qwen2.5-0.5B", "no such model folder"),
        ("~/models", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("smollm3", "no such model folder"),
        ("models/gone.gguf", "no such file"),
    ],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(base: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        resolve(base)


def test_a_file_of_a_model_is_not_a_model(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match="this is a file"):
        resolve(str(tiny_model_folder / "model.safetensors"))
