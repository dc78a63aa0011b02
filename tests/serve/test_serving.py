"""The server over plain HTTP: who may call, bad input, adapters that come and go, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

import tunesmith.cli
from tunesmith.errors import TunesmithError
from tunesmith.folder import write_json
from tunesmith.recipe import dump_recipe, load_recipe
from tunesmith.serve.asking import answered, chat_question
from tunesmith.serve.bodies import ChatBody
from tunesmith.serve.ending import Server
from tunesmith.serve.engine import Limits
from tunesmith.serve.hall import line_up, opened
from tunesmith.serve.listen import bound, url_of
from tunesmith.serve.problems import Problem
from tunesmith.serve.start import MOST_BODY_BYTES, Door, gate_for, http_server
from tunesmith.world import World

if TYPE_CHECKING:
    from conftest import Runs, Serving

Serve = Callable[..., "Serving"]
CHAT = "/v1/chat/completions"
KEY = "a-key-of-some-length"
QUESTION: dict[str, Any] = {
    "model": "a",
    "messages": [{"role": "user", "content": "Say abc"}],
    "temperature": 0,
    "max_tokens": 8,
}


@pytest.fixture
def http(serving: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serving.url, timeout=60) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def until(condition: Callable[[], bool], serving: Serving) -> None:
    """Wait for the engine, step by step, until something holds."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if serving.hall.engine.do(condition).result(60):
            return
    raise AssertionError("never true")


def number_of(name: str, http: httpx.Client) -> float:
    """A counter of /metrics, summed over its labels."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


# Bad input


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        json.dumps({**QUESTION, "temperature": "hot"}).encode(),
        json.dumps({**QUESTION, "temperature": float("nan")}).encode(),
        json.dumps({**QUESTION, "max_tokens": 1.5}).encode(),
        json.dumps({**QUESTION, "max_tokens": True}).encode(),
        json.dumps({**QUESTION, "max_tokens": 10**400}).encode(),
        json.dumps({**QUESTION, "messages": "hello"}).encode(),
        json.dumps({**QUESTION, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps({**QUESTION, "messages": [{"role": "user", "content": 5}]}).encode(),
        json.dumps({**QUESTION, "messages": [{"role": "user", "content": "x", "tool_calls": 5}]}).encode(),
        json.dumps({**QUESTION, "tools": [5]}).encode(),
        json.dumps({**QUESTION, "chat_template": "{{ 7 * 7 }}"}).encode(),
        json.dumps({**QUESTION, "stop": "\ud800"}).encode(),
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
def test_a_bad_body_is_one_clear_error_and_the_next_request_is_answered(body: bytes, http: httpx.Client) -> None:
    refused = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert error_of(refused)["type"] == "invalid_request_error"
    assert http.post(CHAT, json=QUESTION).status_code == 200


def test_what_was_sent_is_not_repeated_in_an_error(http: httpx.Client) -> None:
    secret = "sk-very-secret"
    for changes in ({"temperature": secret}, {"messages": [{"role": secret}]}, {"model": secret}):
        assert secret not in http.post(CHAT, json={**QUESTION, **changes}).text


def test_a_large_body_is_refused_as_it_comes(http: httpx.Client) -> None:
    parts = iter([b" " * (1 << 20)] * (MOST_BODY_BYTES // (1 << 20)) + [b" "])
    refused = http.post(CHAT, content=parts, headers={"content-type": "application/json"})
    assert (refused.status_code, error_of(refused)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", CHAT, 405)])
def test_an_unknown_path_or_verb_is_an_error_in_the_same_shape(
    method: str, path: str, status: int, http: httpx.Client
) -> None:
    refused = http.request(method, path)
    assert refused.status_code == status
    error_of(refused)
    assert refused.headers.get("allow") == ("POST" if status == 405 else None)


def test_a_base_address_without_v1_is_told_where_the_api_is(http: httpx.Client) -> None:
    refused = http.post("/chat/completions", json=QUESTION)
    assert (refused.status_code, error_of(refused)["message"]) == (
        404,
        "there is nothing at this path; the API is under /v1",
    )


@pytest.mark.parametrize("path", ["/jobs", "/v1/files", "/v1/fine_tuning/jobs"])
def test_a_server_without_jobs_says_how_to_start_one_with_them(path: str, http: httpx.Client) -> None:
    refused = http.get(path)
    assert refused.status_code == 404
    assert "--jobs DIR" in error_of(refused)["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_who_looks_whether_it_works_may_ask_without_a_body(path: str, http: httpx.Client) -> None:
    asked = http.head(path)
    assert (asked.status_code, asked.content) == (200, b"")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": None}, "turns: 'messages[1].content' is empty (null), not text"),
        ({"role": "king", "content": "x"}, "messages[1] has a role that is unknown"),
    ],
)
def test_a_message_that_cannot_be_read_is_named_by_its_place(
    message: dict[str, Any], reason: str, http: httpx.Client
) -> None:
    refused = http.post(CHAT, json={**QUESTION, "messages": [*QUESTION["messages"], message]})
    assert error_of(refused)["message"].endswith(reason)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([*QUESTION, "stop", "n", "top_p", "seed", "stream", "stream_options", "tools", "logprobs"]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_is_answered_or_refused(http: httpx.Client, value: object, name: str) -> None:
    content = json.dumps({**QUESTION, name: value}).encode()
    response = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404)


# Who may call


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "10.0.0.1"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
    ids=str,
)
def test_a_foreign_page_is_refused(headers: dict[str, str], status: int, http: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    refused = http.post(CHAT, content=json.dumps(QUESTION).encode(), headers={**kind, **headers})
    assert refused.status_code == status
    error_of(refused)
    assert not [name for name in refused.headers if name.startswith("access-control")]


def test_every_route_and_verb_but_health_needs_the_key(runs: Runs, serve: Serve) -> None:
    server = serve(runs.a, key=KEY)
    wrong = [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xe9"]
    with httpx.Client(base_url=server.url) as http:
        paths = list(http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()["paths"])
        assert CHAT in paths
        for path in [*paths, "/openapi.json", "/nothing"]:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
                for word in wrong if path != "/health" else []:
                    headers = {} if word is None else {"authorization": word.encode("latin-1")}
                    assert http.request(method, path, headers=headers).status_code == 401, (method, path, word)
        assert http.get("/health").json() == {"status": "ok"}
        own = {"authorization": f"bearer {KEY}"}
        assert http.post(CHAT, json=QUESTION, headers=own).status_code == 200
        twice = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")]
        assert http.post(CHAT, json=QUESTION, headers=twice).status_code == 401


def test_another_address_needs_a_key_and_then_goes_by_its_names_and_by_number(runs: Runs, serve: Serve) -> None:
    with pytest.raises(TunesmithError, match="needs a key"):
        gate_for(Door(host="0.0.0.0"))
    with pytest.raises(TunesmithError, match="ASCII"):
        gate_for(Door(key="a b"))
    server = serve(runs.a, key=KEY, host="0.0.0.0")
    own = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=own) as http:
        for host, status in [("192.168.1.7:8000", 200), ("[fe80::1]:80", 200), ("evil.example", 421)]:
            assert http.get("/v1/models", headers={"host": host}).status_code == status
        assert http.get("/v1/models", headers={"host": socket.gethostname()}).status_code == 200
        assert http.get("/v1/models", headers={"host": "10.0.0.1", "origin": "https://10.0.0.1"}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "models.example.org"])
def test_a_printed_address_is_one_that_clients_read_host_and_port_from(host: str) -> None:
    address = httpx.URL(url_of(host, 8001))
    assert (address.scheme, address.host, address.port) == ("http", host, 8001)


def test_the_server_keeps_idle_connections_for_longer_than_its_clients_do() -> None:
    kept = [httpx.Limits().keepalive_expiry, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry]
    assert Server(PlainTextResponse("x"), lifespan="off").config.timeout_keep_alive > max(kept)


# The queue, and clients that leave


def test_a_full_queue_says_when_to_come_back(runs: Runs, serve: Serve) -> None:
    server = serve(runs.a, rows=1, waiting=2)
    with httpx.Client(base_url=server.url) as http:
        refused = http.post(CHAT, json={**QUESTION, "n": 3})
        assert (refused.status_code, error_of(refused)["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) > 0
        assert http.post(CHAT, json={**QUESTION, "n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool, runs: Runs, serve: Serve) -> None:
    server = serve(runs.base, rows=1, context_tokens=500)
    engine = server.hall.engine
    long = {"model": "lively", "prompt": "abc", "max_tokens": 400, "temperature": 1.5, "stream": stream, "n": 16}
    body = json.dumps(long).encode()
    lines = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", *lines]).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head + body)
        until(lambda: bool(engine.live.rows), server)
    until(lambda: not engine.live.rows and not engine.waiting, server)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert number_of("tunesmith_completion_tokens_total", http) < 16 * 400 / 2
        assert http.post("/v1/completions", json={**long, "max_tokens": 1, "n": 1, "stream": False}).status_code == 200


# Adapters that come and go


def test_an_adapter_comes_while_others_are_answered_and_goes(runs: Runs, serve: Serve) -> None:
    server = serve(runs.a)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        before = http.post(CHAT, json=QUESTION).json()["choices"]
        added = http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(runs.b)})
        assert (added.status_code, added.json()["id"], added.json()["parent"]) == (200, "new", "lively")
        new = http.post(CHAT, json={**QUESTION, "model": "new"}).json()["choices"]
        assert http.post(CHAT, json=QUESTION).json()["choices"] == before != new
        again = http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(runs.b)})
        assert "already" in error_of(again)["message"]
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
        assert http.post(CHAT, json={**QUESTION, "model": "new"}).status_code == 404
        engine = server.hall.engine
        until(lambda: all(set(layer.low_rank) <= {"a#1"} for layer in engine.adapters.layers.values()), server)
        for name in ("new", "lively"):
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 400


def test_a_request_whose_adapter_goes_while_its_turns_are_read_is_404_and_ends_no_other(
    runs: Runs, serve: Serve
) -> None:
    server = serve(runs.a, runs.b)
    hall = server.hall

    async def asked_too_late() -> int:
        question = await chat_question(ChatBody(**QUESTION), hall)
        hall.remove("a")
        with pytest.raises(Problem) as caught:
            await anext(answered(hall.engine, question))
        return caught.value.status

    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert asyncio.run(asked_too_late()) == 404
        until(lambda: hall.engine.adapters.known == {"b#2"}, server)
        assert http.post(CHAT, json={**QUESTION, "model": "b"}).status_code == 200


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "x" * 200])
def test_an_adapters_name_is_plain(name: str, http: httpx.Client, runs: Runs) -> None:
    refused = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(runs.b)})
    assert refused.status_code == 400


def broken(runs: Runs, folder: Path, what: str) -> Path:
    """A copy of run b with something wrong."""
    path = folder / "copy"
    if what == "too long a name":
        return folder / ("x" * 300)
    if what == "absent":
        return path
    shutil.copytree(runs.b, path)
    match what:
        case "unfinished":
            (path / "results.json").unlink()
        case "adapter gone":
            shutil.rmtree(path / "adapter")
        case "cut short":
            file = path / "adapter" / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        case "another base":
            shutil.copytree(runs.base, folder / "other")
            text = (path / "recipe.yaml").read_text().replace(str(runs.base), str(folder / "other"))
            (path / "recipe.yaml").write_text(text)
        case "reward":
            recipe = (path / "recipe.yaml").read_text().replace("method: sft", "method: reward")
            (path / "recipe.yaml").write_text(recipe)
        case "another shape":
            config = json.loads((path / "adapter" / "adapter_config.json").read_text())
            (path / "adapter" / "manifest.json").unlink()
            write_json(path / "adapter" / "adapter_config.json", {**config, "r": 5})
            from tunesmith.folder import write_manifest

            write_manifest(path / "adapter")
    return path


BROKEN = {
    "absent": "not a run folder",
    "too long a name": "cannot be read",
    "unfinished": "has not finished",
    "adapter gone": "it is gone",
    "cut short": "bytes, not",
    "another base": "another base|an adapter of",
    "reward": "gives scores",
    "another shape": "another shape",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_run_that_cannot_be_served_is_refused_with_the_reason(
    what: str, runs: Runs, tmp_path: Path, http: httpx.Client
) -> None:
    path = broken(runs, tmp_path, what)
    refused = http.post("/v1/load_lora_adapter", json={"lora_name": "copy", "lora_path": str(path)})
    assert refused.status_code == 400
    assert re.search(BROKEN[what], error_of(refused)["message"])
    assert http.post(CHAT, json=QUESTION).status_code == 200
    if what != "absent":
        with pytest.raises(TunesmithError, match=BROKEN[what]):
            opened(line_up([str(runs.a), str(path)], ""), Limits(), World())


def test_runs_that_cannot_share_a_server_are_refused(runs: Runs, finished_run: Path, tmp_path: Path) -> None:
    full = finished_run.parent / "run"
    for names, update, why in [
        ([runs.a, runs.a], "", "same name"),
        ([runs.a, runs.base], "", "not a run folder"),
        ([runs.a, full], "", "shares no base|an adapter of"),
        ([full, runs.a], "full", "has no update 'full'"),
        ([runs.a], "base", "has no update 'base'"),
    ]:
        with pytest.raises(TunesmithError, match=why):
            line_up([str(name) for name in names], update)


def test_a_base_named_by_a_dot_has_its_folders_name(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.base)
    assert line_up(["."], "").name == "lively"


def test_a_fully_tuned_run_is_served_alone_by_its_own_name(finished_run: Path) -> None:
    hall = opened(line_up([str(finished_run.parent / "run")], "full"), Limits(), World())
    try:
        assert list(hall.served) == ["run"]
    finally:
        hall.engine.close()


@pytest.mark.parametrize(("update", "rank"), [("lora", 4), ("economy", 8)])
def test_of_two_adapters_the_one_asked_for_is_served(update: str, rank: int, runs: Runs, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(runs.a, both)
    shutil.copytree(runs.b / "adapter", both / "economy")
    recipe = load_recipe(both / "recipe.yaml").model_copy(update={"update": ["lora", "economy"]})
    (both / "recipe.yaml").write_text(dump_recipe(recipe))
    hall = opened(line_up([str(both)], update), Limits(), World())
    try:
        layers = hall.engine.adapters.layers.values()
        ranks = {len(a) for layer in layers for a, _ in layer.low_rank.values()}
        assert ranks == {rank}
    finally:
        hall.engine.close()


# What it tells


def test_metrics_count_answers_and_tokens_and_make_no_label_of_a_clients_words(runs: Runs, serve: Serve) -> None:
    server = serve(runs.a)
    with httpx.Client(base_url=server.url) as http:
        usage = http.post(CHAT, json=QUESTION).json()["usage"]
        http.post(CHAT, json={**QUESTION, "model": "some-words"})
        http.get("/some-words")
        text = http.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found['tunesmith_prompt_tokens_total{model="a"}']) == usage["prompt_tokens"]
    assert float(found['tunesmith_completion_tokens_total{model="a"}']) == usage["completion_tokens"]
    assert float(found[f'tunesmith_requests_total{{method="POST",route="{CHAT}",status="200"}}']) == 1
    assert float(found[f'tunesmith_requests_total{{method="POST",route="{CHAT}",status="404"}}']) == 1
    assert (found["tunesmith_rows_live"], found["tunesmith_rows_waiting"]) == ("0.0", "0.0")
    assert "some-words" not in text


# The command


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str | Path, **env: str) -> subprocess.Popen[str]:
        source = Path(tunesmith.cli.__file__).parents[1]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tunesmith.cli", "serve", *map(str, words)],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(source), **env},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address_of(process: subprocess.Popen[str]) -> str:
    """Where it listens, once it does."""
    assert process.stderr
    while True:
        line = process.stderr.readline()
        assert line, process.wait()
        assert KEY not in line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]


@pytest.mark.slow
def test_sigterm_lets_answers_under_way_end_and_no_new_one_begin(
    command: Callable[..., subprocess.Popen[str]], runs: Runs
) -> None:
    process = command(runs.a, "--port", "0", "--context", "512", TUNESMITH_KEY=KEY)
    address = address_of(process)
    own = {"authorization": f"Bearer {KEY}"}
    asked = {"model": "a", "prompt": "abc", "max_tokens": 400, "temperature": 1.5, "seed": 1, "n": 16, "stream": True}
    with httpx.Client(base_url=address, headers=own, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=asked) as response:
            events = response.iter_lines()
            assert next(events).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in events if line]
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert len([reason for reason in reasons if reason]) == 16
        assert rest[-1] == "data: [DONE]"
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "every accepted answer was finished" in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_says_what_was_cut_off(
    command: Callable[..., subprocess.Popen[str]], runs: Runs
) -> None:
    process = command(runs.a, "--port", "0", "--context", "512")
    address = address_of(process)
    # More than can be finished before the second interrupt comes, however busy the machine.
    asked = {"model": "a", "prompt": ["abc"] * 16, "max_tokens": 500, "temperature": 1.5, "n": 16, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=asked, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
        process.send_signal(signal.SIGINT)
        with suppress(httpx.TransportError):  # it is heard once the door is closed
            while True:
                httpx.get(f"{address}/health")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "answers under way are cut off" in said
    assert "every accepted answer was finished" not in said


def test_answers_that_outlast_the_drain_are_counted_and_their_clients_told(runs: Runs) -> None:
    hall = opened(line_up([str(runs.a)], ""), Limits(), World())
    server, stuck = http_server(hall, gate_for(Door()), drain_seconds=0), threading.Event()
    with closing(hall.engine), closing(bound("127.0.0.1", 0)) as own, ThreadPoolExecutor(2) as pool:
        address = f"http://127.0.0.1:{own.getsockname()[1]}"
        running = pool.submit(server.run, sockets=[own])
        blocked = hall.engine.do(stuck.wait)
        try:
            with (
                httpx.Client(base_url=address, timeout=60) as http,
                http.stream("POST", CHAT, json={**QUESTION, "stream": True}) as streamed,
            ):
                events = streamed.iter_lines()
                assert "assistant" in next(events)
                whole = pool.submit(httpx.post, f"{address}{CHAT}", json=QUESTION, timeout=60)
                while len(server.server_state.tasks) < 2:
                    assert not whole.done()
                server.should_exit = True
                running.result(60)
                assert (whole.result(60).status_code, error_of(whole.result())["type"]) == (503, "server_error")
                with pytest.raises(httpx.RemoteProtocolError):
                    list(events)
        finally:
            server.should_exit = True
            stuck.set()
            blocked.result(60)
    assert server.ended() == "cut off after 0 s: 2 answers that had not ended"


def test_a_server_that_finished_what_it_accepted_says_so(runs: Runs) -> None:
    hall = opened(line_up([str(runs.a)], ""), Limits(), World())
    server = http_server(hall, gate_for(Door()))
    with closing(hall.engine), closing(bound("127.0.0.1", 0)) as own, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run, sockets=[own])
        try:
            asked = httpx.post(f"http://127.0.0.1:{own.getsockname()[1]}{CHAT}", json=QUESTION, timeout=60)
            assert asked.status_code == 200
        finally:
            server.should_exit = True
        running.result(60)
    assert server.ended() == "every accepted answer was finished"


@pytest.mark.slow
def test_the_command_says_what_is_wrong_and_ends_with_2(
    command: Callable[..., subprocess.Popen[str]], runs: Runs
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            f"port {port} is in use": [runs.a, "--port", port],
            "needs a key": [runs.a, "--host", "0.0.0.0"],
            "has no address": [runs.a, "--host", "203.0.113.7", "--key", KEY],
            "no such model": ["nowhere/to/be/found", "--port", "0"],
        }
        started = {why: command(*words) for why, words in wrong.items()}
        for why, process in started.items():
            _, said = process.communicate(timeout=120)
            assert (process.returncode, why in said, "Traceback" in said) == (2, True, False), said


def test_a_failing_step_ends_its_rows_and_not_the_server(serving: Serving) -> None:
    import numpy as np

    from tunesmith.model.sample import Row, Sampling
    from tunesmith.serve.engine import Asked, Drawn

    told: list[Drawn] = []
    heard = threading.Event()

    def tell(one: Drawn) -> None:
        told.append(one)
        if one.stop or one.failed:
            heard.set()

    how = Sampling(max_new_tokens=2)
    serving.hall.engine.ask(Asked(Row(np.array([10**6]), how), tell))
    assert heard.wait(60)
    assert told[-1].failed == "IndexError in the model"
    heard.clear()
    serving.hall.engine.ask(Asked(Row(np.array([5]), how), tell))
    assert heard.wait(60)
    assert told[-1].stop


@pytest.mark.slow
def test_no_request_made_of_the_description_is_a_server_error(serving: Serving) -> None:
    script = Path(__file__).parents[2] / "bench" / "fuzz.py"
    command = [sys.executable, str(script), serving.url, "--requests", "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(done.stdout)["requests"] > 300
