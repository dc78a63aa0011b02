"""What tests of both servers share: pairs and a real browser for the label page, finished runs for the models' API."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith import cli
from tunesmith.serve.choices import Pair
from tunesmith.types import Message

if TYPE_CHECKING:
    from tunesmith.serve.hall import Hall

SOURCE = Path(cli.__file__).parents[1]
WAIT_SECONDS = 120  # before a test that hangs fails
KEY_CODES = {"ArrowLeft": 37, "ArrowRight": 39}


def make_pair(number: int, **changes: Any) -> Pair:
    prompt = (Message(role="user", content=f"Question {number}?"),)
    a, b = (Message(role="assistant", content=f"{side} answers {number}.") for side in ("Alpha", "Beta"))
    return Pair(**{"prompt": prompt, "a": a, "b": b, **changes})


@pytest.fixture(scope="session")
def pair() -> Callable[..., Pair]:
    """Makes pairs that differ by their number; keywords replace fields."""
    return make_pair


@dataclass(kw_only=True)
class Server:
    """`tunesmith label` in a process of its own."""

    words: list[str]
    cwd: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start it, on the port that it had before, and return its address once it is listening."""
        command = [sys.executable, "-m", "tunesmith.cli", "label", *self.words, "--port", str(self.port)]
        env = {**os.environ, "PYTHONPATH": str(SOURCE)}
        self.process = subprocess.Popen(command, cwd=self.cwd, env=env, stderr=subprocess.PIPE, text=True)
        said = []
        assert self.process.stderr
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return found[0]
        raise AssertionError("".join(said))

    def interrupt(self) -> tuple[int, str]:
        """As Ctrl-C would; returns the exit code and what it said last."""
        assert self.process
        process, self.process = self.process, None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        return process.returncode, said

    def kill(self) -> None:
        """As a power cut would: no goodbye."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers, and kills them at the end."""
    made: list[Server] = []

    def make(*words: str) -> Server:
        made.append(Server(words=list(words), cwd=tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@dataclass(kw_only=True)
class Browser:
    """Chromium without a window, spoken to in the DevTools protocol: JSON messages that end in a NUL byte."""

    process: subprocess.Popen[bytes]
    writes: int
    reads: int
    session: str = ""
    sent: int = 0
    unread: bytes = b""
    complaints: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        if self.session and not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))
            if answer.get("id") == self.sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, address: str) -> str:
        """A new tab with this page; returns its id."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=address)
        return target

    def close(self, target: str) -> None:
        """Close a tab."""
        self.call("Target.closeTarget", targetId=target)
        self.session = ""

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait, in the page, for a condition."""
        # While a page is loading, what the condition asks for may not be there yet.
        holds = f"let holds = false; try {{ holds = {condition}; }} catch {{}}"
        look = f"{holds} if (holds) ok(true); else if (Date.now() > end) ok(false); else setTimeout(look, 5);"
        end = f"Date.now() + {WAIT_SECONDS * 1000}"
        script = f"new Promise((ok) => {{ const end = {end}; const look = () => {{ {look} }}; look(); }})"
        assert self.run(script), f"never true: {condition}; {self.run('document.body.innerText')}"

    def press(self, key: str) -> None:
        """Strike a key, as a person would."""
        code = KEY_CODES.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {}
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            key=key,
            windowsVirtualKeyCode=code,
            **text,
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.reads], [], [], WAIT_SECONDS)
            part = os.read(self.reads, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh chromium; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None or shutil.which("bash") is None:
        pytest.skip("there is no chromium on this machine")
    hears, writes = os.pipe()
    reads, speaks = os.pipe()
    flags = [
        *("--headless=new", "--remote-debugging-pipe", f"--user-data-dir={tmp_path / 'browser'}", "--no-sandbox"),
        *("--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--window-size=1280,860", "--hide-scrollbars"),
    ]
    # Chromium reads commands from descriptor 3 and answers on 4.
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{hears} 4>&{speaks}', program, *flags, "about:blank"]
    with (tmp_path / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            pass_fds=(hears, speaks),
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": str(tmp_path)},
            start_new_session=True,
        )
    os.close(hears)
    os.close(speaks)
    yield Browser(process=process, writes=writes, reads=reads)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(writes)
    os.close(reads)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Finished runs of one base, whose random adapters make them answer differently."""

    base: Path
    a: Path
    b: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Runs:
    """Two finished runs, `a` and `b`, made without training, and their base `lively`: no two answers are alike."""
    import torch

    from tunesmith.model.adapters import save_adapter, save_model
    from tunesmith.model.load import load
    from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
    from tunesmith.recipe import Recipe, dump_recipe
    from tunesmith.world import World

    folder = tmp_path_factory.mktemp("runs")
    base = load(str(tiny_model_folder), World())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in base.hf.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.5, generator=draw)
    save_model(base, folder / "lively")
    for name, rank in (("a", 4), ("b", 8)):
        model = load(str(folder / "lively"), World())
        shape = LoraShape(rank=rank, alpha=2 * rank, seed=rank)
        attach_lora(model.hf, shape, head=model.head)
        with torch.no_grad():
            for layer in lora_layers(model.hf).values():
                layer.lora_b.normal_(0.0, 0.3, generator=draw)
        save_adapter(model, shape, folder / name / "adapter")
        recipe = {"base": str(folder / "lively"), "data": {"train": "rows.jsonl"}, "task": {"instructions": "Do."}}
        (folder / name / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(recipe)))
        (folder / name / "results.json").write_text('{"subject": "lora"}')
    return Runs(base=folder / "lively", a=folder / "a", b=folder / "b")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server in a thread of this process."""

    url: str
    hall: Hall


Serve = Callable[..., Serving]


@contextmanager
def _served(stack: ExitStack) -> Iterator[Serve]:
    from tunesmith.screen import Screen
    from tunesmith.serve.engine import Limits
    from tunesmith.serve.hall import line_up, opened
    from tunesmith.serve.listen import bound
    from tunesmith.serve.start import Door, gate_for, http_server
    from tunesmith.serve.tuning import Shop, held, opened_desk
    from tunesmith.world import World

    def serve(
        *models: Path,
        key: str = "",
        host: str = "127.0.0.1",
        jobs: Path | None = None,
        python_graders: bool = False,
        most_file_bytes: int = 10_000_000,
        **limits: int,
    ) -> Serving:
        hall = opened(line_up([str(model) for model in models], ""), Limits(**limits), World())
        stack.callback(hall.engine.close)
        server_socket = stack.enter_context(closing(bound("127.0.0.1", 0)))
        desk = None
        if jobs:
            stack.enter_context(held(jobs))
            desk = stack.enter_context(
                opened_desk(Shop(folder=jobs, python_graders=python_graders), hall, Screen(quiet=True), key=key)
            )
            desk = replace(desk, most_file_bytes=most_file_bytes)
        server = http_server(hall, gate_for(Door(host=host, key=key), tuning=jobs is not None), desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [server_socket]})
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        return Serving(url=f"http://127.0.0.1:{server_socket.getsockname()[1]}", hall=hall)

    with stack:
        yield serve


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers that end with the test."""
    with _served(ExitStack()) as start:
        yield start


@pytest.fixture(scope="session")
def serving(runs: Runs) -> Iterator[Serving]:
    """Both runs and their base behind one server."""
    with _served(ExitStack()) as start:
        yield start(runs.a, runs.b, context_tokens=256)


@pytest.fixture(scope="session")
def shop(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that takes fine-tuning jobs, with room for files of 100,000 bytes."""
    with _served(ExitStack()) as start:
        yield start(
            tiny_model_folder,
            jobs=tmp_path_factory.mktemp("shop") / "jobs",
            most_file_bytes=100_000,
            python_graders=True,
        )
