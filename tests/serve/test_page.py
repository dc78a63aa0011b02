"""The label page over HTTP: who may call it, what it refuses, and that no input makes it fail."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.serve.choices import Pair, add_pairs, opened, read_choices
from tunesmith.serve.guard import MOST_BODY_BYTES
from tunesmith.serve.page import PAGE, label_app

MakePair = Callable[..., Pair]
HOST = "127.0.0.1:8765"
OWN = f"http://{HOST}"
COUNT = 6


@pytest.fixture
def store(tmp_path: Path, pair: MakePair) -> Iterator[sqlite3.Connection]:
    with opened(tmp_path, create=True) as opened_store:
        add_pairs(opened_store, [pair(number, model_a="M1", model_b="M2") for number in range(COUNT)])
        yield opened_store


@pytest.fixture
def client(store: sqlite3.Connection) -> TestClient:
    return TestClient(label_app(store, "job"), base_url=OWN)


def state_of(client: TestClient, rater: str = "Anna") -> dict[str, Any]:
    return client.get("/api/state", params={"rater": rater}).json()


def body_for(state: dict[str, Any], pick: str = "left", rater: str = "Anna") -> dict[str, Any]:
    task = state["task"]
    return {
        "id": str(uuid.uuid4()),
        "rater": rater,
        "pair": task["pair"],
        "repeat": task["repeat"],
        "pick": pick,
        "seconds": 2.5,
    }


def test_a_rater_works_through_all_pairs_and_the_answer_to_a_choice_is_the_next_pair(
    client: TestClient, store: sqlite3.Connection
) -> None:
    state = state_of(client)
    assert (state["done"], state["total"], state["last"]) == (0, COUNT + 1, None)
    seen = []
    while state["task"]:
        seen.append((state["task"]["pair"], state["task"]["repeat"]))
        body = body_for(state)
        response = client.post("/api/choices", json=body)
        assert response.status_code == 200
        state = response.json()
        assert state["last"] == body["id"]
        assert state == state_of(client)
    assert state["done"] == state["total"] == len(set(seen)) == COUNT + 1
    assert len(read_choices(store)) == len(seen)


def test_a_state_tells_no_model_and_no_side(client: TestClient) -> None:
    state = state_of(client)
    assert set(state["task"]) == {"pair", "repeat", "prompt", "left", "right"}
    assert "M1" not in json.dumps(state)
    number = state["task"]["prompt"][0]["text"].removeprefix("Question ").removesuffix("?")
    assert {state["task"]["left"], state["task"]["right"]} == {f"Alpha answers {number}.", f"Beta answers {number}."}


def test_a_choice_sent_again_gives_the_same_state_and_counts_once(
    client: TestClient, store: sqlite3.Connection
) -> None:
    body = body_for(state_of(client))
    first, second = (client.post("/api/choices", json=body) for _ in range(2))
    assert (second.status_code, second.json()) == (200, first.json())
    assert len(read_choices(store)) == 1


def test_a_pair_answered_in_another_tab_is_a_conflict(client: TestClient, store: sqlite3.Connection) -> None:
    state = state_of(client)
    assert client.post("/api/choices", json=body_for(state)).status_code == 200
    late = client.post("/api/choices", json=body_for(state, "right"))
    assert late.status_code == 409
    assert "answered already" in late.json()["error"]
    assert len(read_choices(store)) == 1


def test_undo_shows_the_pair_again(client: TestClient) -> None:
    start = state_of(client)
    after = client.post("/api/choices", json=body_for(start)).json()
    for _ in range(2):
        undone = client.post("/api/undo", json={"id": after["last"], "rater": "Anna"})
        assert (undone.status_code, undone.json()) == (200, start)
    assert client.post("/api/undo", json={"id": str(uuid.uuid4()), "rater": "Anna"}).status_code == 409


def test_raters_at_once_get_every_choice_recorded_once(store: sqlite3.Connection) -> None:
    app = label_app(store, "job")

    def work(rater: str) -> int:
        with ExitStack() as stack:
            client = stack.enter_context(TestClient(app, base_url=OWN))
            state, count = state_of(client, rater), 0
            while state["task"]:
                body = body_for(state, rater=rater)
                copies = [client.post("/api/choices", json=body) for _ in range(2)]
                assert [copy.status_code for copy in copies] == [200, 200]
                state, count = copies[1].json(), count + 1
        return count

    raters = ["Anna", "Bob", "Carl"]
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(work, raters))
    assert counts == [COUNT + 1] * 3
    found = read_choices(store)
    assert len(found) == len({(one.rater, one.pair, one.repeat) for one in found}) == 3 * (COUNT + 1)


# Who may call


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "a@127.0.0.1", "localhost:x"]
)
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/api/state?rater=Anna"):
        response = client.get(path, headers={"host": host})
        assert response.status_code == 421
        assert response.json()["error"]


@pytest.mark.parametrize("host", [HOST, "localhost:8765", "localhost", "LOCALHOST:9000"])
def test_a_loopback_name_with_any_port_may_call(client: TestClient, host: str) -> None:
    assert client.get("/api/about", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://127.0.0.1:8765"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_pages_script_is_refused_and_changes_nothing(
    client: TestClient, store: sqlite3.Connection, headers: dict[str, str]
) -> None:
    response = client.post("/api/choices", json=body_for(state_of(client)), headers=headers)
    assert response.status_code == 403
    assert read_choices(store) == []


def test_a_form_cannot_post_and_there_is_no_cors(client: TestClient, store: sqlite3.Connection) -> None:
    body = json.dumps(body_for(state_of(client)))
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.post("/api/choices", content=body, headers={"content-type": kind}).status_code == 415
    asked = {"origin": OWN, "access-control-request-method": "POST"}
    for response in (client.options("/api/choices", headers=asked), client.get("/api/about", headers={"origin": OWN})):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert read_choices(store) == []


def test_the_page_is_one_file_that_may_load_nothing(client: TestClient) -> None:
    response = client.get("/")
    assert response.text == PAGE.read_text(encoding="utf-8")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert response.headers["x-content-type-options"] == "nosniff"
    for outside in ("https://", "//cdn", "@import", "src=", "innerHTML", "insertAdjacentHTML", "document.write"):
        assert outside not in response.text, outside


# Bad input


def test_a_large_body_is_refused(client: TestClient, store: sqlite3.Connection) -> None:
    kind = {"content-type": "application/json"}
    large = b" " * (MOST_BODY_BYTES + 1)
    parts = iter([b" " * MOST_BODY_BYTES, json.dumps(body_for(state_of(client))).encode()])
    for content in (large, parts):  # with its length, and in chunks without
        assert client.post("/api/choices", content=content, headers=kind).status_code == 413
    assert read_choices(store) == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"pick": "middle"}, 422),
        ({"rater": "  "}, 422),
        ({"rater": "x" * 61}, 422),
        ({"rater": "\ud800"}, 422),
        ({"seconds": -1}, 422),
        ({"seconds": "1"}, 422),
        ({"repeat": "no"}, 422),
        ({"id": "1"}, 422),
        ({"more": 1}, 422),
        ({"pair": "f" * 16}, 404),
    ],
    ids=str,
)
def test_a_bad_choice_is_one_clear_message(
    client: TestClient, store: sqlite3.Connection, change: dict[str, object], status: int
) -> None:
    content = json.dumps({**body_for(state_of(client)), **change})
    response = client.post("/api/choices", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert set(response.json()) == {"error", "fix"}
    assert read_choices(store) == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/api/choices", 405), ("GET", "/api/state", 422), ("GET", "/docs", 404)],
)
def test_a_wrong_address_is_one_clear_message(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
almost_choices = st.fixed_dictionaries(
    {},
    optional={
        "id": st.uuids().map(str) | json_values,
        "rater": st.text(max_size=70) | json_values,
        "pair": st.from_regex(r"[0-9a-f]{16}", fullmatch=True) | json_values,
        "repeat": st.booleans() | json_values,
        "pick": st.sampled_from(["left", "tie"]) | json_values,
        "seconds": st.floats() | st.integers() | json_values,
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60) | (almost_choices | json_values).map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from(["/api/choices", "/api/undo"]),
)
def test_no_body_makes_the_server_fail(
    client: TestClient, store: sqlite3.Connection, content: bytes, path: str
) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]
    assert read_choices(store) == []


@pytest.mark.parametrize(
    "content",
    [b"[" * 10_000, b'{"id": ' + b"9" * 5000 + b"}", b'{"seconds": 1e999}', b"\xff\xfe", b"", b'{"rater": "\\ud800"}'],
    ids=["deep", "long number", "infinite", "not UTF-8", "empty", "half a character"],
)
def test_bodies_known_to_break_parsers_are_refused(client: TestClient, content: bytes) -> None:
    response = client.post("/api/choices", content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]


def test_a_choice_that_cannot_be_saved_is_not_confirmed(client: TestClient, store: sqlite3.Connection) -> None:
    body = body_for(state_of(client))
    store.execute("PRAGMA query_only = ON")
    response = client.post("/api/choices", json=body)
    assert response.status_code == 503
    assert "not saved" in response.json()["error"]
    store.execute("PRAGMA query_only = OFF")
    assert client.post("/api/choices", json=body).status_code == 200
