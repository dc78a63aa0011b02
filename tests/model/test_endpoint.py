"""An endpoint that misbehaves is asked again; one that refuses is believed; the key is seen by nobody else."""

from __future__ import annotations

import itertools
import socket
import threading
from typing import Any

import httpx2
import pytest

from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.endpoint import (
    Endpoint,
    Question,
    Reply,
    _Pace,
    _retry_after,
    answer_all,
    check_url,
)
from tunesmith.types import Message

KEY = "sk-a-secret-that-nobody-may-see"


def questions(count: int, temperature: float = 0.0) -> list[Question]:
    return [
        Question(
            id=f"q{n}",
            messages=(Message(role="system", content="Shout."), Message(role="user", content=f"Say: word{n}")),
            temperature=temperature,
            max_new_tokens=8,
            seed=n,
        )
        for n in range(count)
    ]


def ask(server: Any, count: int, **changes: Any) -> dict[str, Reply]:
    found: dict[str, Reply] = {}
    settings: dict[str, Any] = {"key": KEY, "first_wait_seconds": 0.001, "timeout_seconds": 20.0, **changes}
    endpoint = Endpoint(url=server.url, model="big", **settings)
    answer_all(endpoint, questions(count), lambda question, reply: found.update({question.id: reply}))
    return found


def test_every_question_is_answered_once_with_its_tokens(chat_server: Any) -> None:
    found = ask(chat_server, 12)
    assert {name: reply.text for name, reply in found.items()} == {f"q{n}": f"WORD{n}" for n in range(12)}
    assert sorted(chat_server.asked) == sorted(f"Say: word{n}" for n in range(12))
    assert (found["q3"].prompt_tokens, found["q3"].completion_tokens) == (50, 3)
    assert chat_server.bodies[0]["model"] == "big"
    assert chat_server.bodies[0]["max_tokens"] == 8
    assert [turn["role"] for turn in chat_server.bodies[0]["messages"]] == ["system", "user"]
    assert set(chat_server.keys) == {f"Bearer {KEY}"}


def test_a_server_that_counts_no_tokens_is_believed_the_first_time(chat_server: Any) -> None:
    said = {"message": {"role": "assistant", "content": "WORD0"}, "finish_reason": None}
    body = {"choices": [said], "usage": {"prompt_tokens": None, "completion_tokens": None}}
    chat_server.faults.append((200, {}, body))
    reply = ask(chat_server, 1)["q0"]
    assert (reply.text, reply.prompt_tokens, len(chat_server.asked)) == ("WORD0", None, 1)


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        (429, {}, {}),
        (500, {}, "oops"),
        (503, {"Retry-After": "0"}, {}),
        "disconnect",
        "garbage",
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(chat_server: Any, fault: Any) -> None:
    chat_server.faults += [fault] * 3
    assert len(ask(chat_server, 4)) == 4
    assert len(chat_server.asked) == 7


@pytest.mark.parametrize("fault", ["silence", "drip"])
def test_a_server_that_is_too_slow_is_asked_again(chat_server: Any, fault: str) -> None:
    chat_server.faults.append(fault)
    assert len(ask(chat_server, 1, timeout_seconds=0.5)) == 1
    assert len(chat_server.asked) == 2


def test_a_server_that_stays_down_ends_in_one_message_and_what_was_answered_is_kept(chat_server: Any) -> None:
    found: dict[str, Reply] = {}
    endpoint = Endpoint(url=chat_server.url, model="big", first_wait_seconds=0.001, tries=3, parallel=1)

    def keep(question: Question, reply: Reply) -> None:
        found[question.id] = reply
        if len(found) == 4:
            chat_server.faults += [(500, {}, {"error": "on fire"})] * 3

    with pytest.raises(ModelError, match=r"does not answer \(500: on fire\)"):
        answer_all(endpoint, questions(9), keep)
    assert len(found) == 4


@pytest.fixture
def nobody() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_an_address_where_nobody_listens_is_told_at_once(nobody: str) -> None:
    # With so long a wait a second try would not end in this test's time.
    endpoint = Endpoint(url=nobody, model="big", first_wait_seconds=3600.0)
    with pytest.raises(ModelError) as caught:
        answer_all(endpoint, questions(2), lambda question, reply: None)
    assert str(caught.value) == (
        f"{nobody}: the teacher cannot be reached (connection refused)\nStart the server or mend task.teacher.by."
    )


def test_a_teacher_that_goes_away_is_told_at_the_first_retry_and_waited_for(
    chat_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Reply] = {}
    said: list[str] = []
    send, refusals = httpx2.HTTPTransport.handle_request, 0

    def handle(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        nonlocal refusals
        if found and refusals < 2:
            refusals += 1
            raise httpx2.ConnectError("[Errno 111] Connection refused")
        return send(transport, request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle)
    endpoint = Endpoint(url=chat_server.url, model="big", first_wait_seconds=0.001, parallel=1)
    answer_all(endpoint, questions(3), lambda question, reply: found.update({question.id: reply}), said.append)
    assert (len(found), refusals) == (3, 2)
    assert said == ["teacher does not answer (connection refused); trying again"]


def test_a_teacher_that_stays_away_is_to_be_started_again(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Reply] = {}
    send = httpx2.HTTPTransport.handle_request

    def handle(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        if found:
            raise httpx2.ConnectError("[Errno 111] Connection refused")
        return send(transport, request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle)
    endpoint = Endpoint(url=chat_server.url, model="big", first_wait_seconds=0.001, tries=2)
    with pytest.raises(
        ModelError, match=r"(?s)does not answer \(connection refused\).*Start the server again"
    ) as caught:
        answer_all(endpoint, questions(3), lambda question, reply: found.update({question.id: reply}))
    assert "requests_per_minute" not in str(caught.value)


def test_a_wait_that_the_server_asks_for_is_no_failure_to_tell(chat_server: Any) -> None:
    said: list[str] = []
    chat_server.faults += [(429, {"Retry-After": "0"}, {}), (500, {}, "oops"), "garbage"]
    endpoint = Endpoint(url=chat_server.url, model="big", first_wait_seconds=0.001)
    answer_all(endpoint, questions(2), lambda question, reply: None, said.append)
    assert said == ["teacher does not answer (500: oops); trying again"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_stops_after_one_request_and_is_not_repeated(chat_server: Any, status: int) -> None:
    chat_server.faults += [(status, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})] * 9
    with pytest.raises(ModelError, match="OPENAI_API_KEY") as caught:
        ask(chat_server, 5)
    assert len(chat_server.asked) == 1
    assert KEY not in str(caught.value)


def test_an_unknown_model_and_an_empty_account_stop_at_once(chat_server: Any) -> None:
    for status, code in ((404, "model_not_found"), (429, "insufficient_quota")):
        chat_server.faults.append((status, {}, {"error": {"message": f"{code} for {KEY}", "code": code}}))
        with pytest.raises(ModelError, match=code) as caught:
            ask(chat_server, 3)
        assert KEY not in str(caught.value)
    assert len(chat_server.asked) == 2


def test_what_is_refused_of_one_question_is_its_reply(chat_server: Any) -> None:
    chat_server.faults.append((400, {}, {"error": {"message": "content policy"}}))
    found = ask(chat_server, 3)
    assert found["q0"].refusal == "400: content policy"
    assert [found[name].text for name in ("q1", "q2")] == ["WORD1", "WORD2"]
    chat_server.finish = "content_filter"
    assert ask(chat_server, 1)["q0"].refusal == "content_filter"
    chat_server.finish = "length"
    assert ask(chat_server, 1)["q0"].stop == "length"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}], ids=str)
def test_a_teacher_that_does_not_count_its_tokens_has_answered_all_the_same(chat_server: Any, usage: Any) -> None:
    choice = {"message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
    chat_server.faults.append((200, {}, {"choices": [choice], "usage": usage}))
    reply = ask(chat_server, 1)["q0"]
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("word", None, None)
    assert len(chat_server.asked) == 1


def test_no_more_requests_are_under_way_than_allowed(chat_server: Any) -> None:
    under_way, most, lock, all_here = 0, 0, threading.Lock(), threading.Barrier(3)

    def before(question: str) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        if question != "Say: word0":  # the first is asked alone
            all_here.wait()
        with lock:
            under_way -= 1

    chat_server.before = before
    assert len(ask(chat_server, 10, parallel=3)) == 10
    assert most == 3


def test_requests_keep_their_distance_and_all_hold_when_told() -> None:
    pace = _Pace(60)
    pace.stop.set()  # so that nobody waits
    starts = []
    for _ in range(4):
        pace.turn()
        starts.append(pace._next)
    assert [round(b - a, 6) for a, b in itertools.pairwise(starts)] == [1.0, 1.0, 1.0]
    pace.hold(100)
    assert pace._next > starts[-1] + 90


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _retry_after("7") == 7.0
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    later = _retry_after("Wed, 21 Oct 2099 07:28:00 GMT")
    assert later is not None
    assert later > 1e6
    assert _retry_after("soon") is None
    assert _retry_after("") is None


def test_a_server_that_wants_hours_is_not_waited_for(chat_server: Any) -> None:
    chat_server.faults.append((429, {"Retry-After": "7200"}, {}))
    with pytest.raises(ModelError, match="come back in 7200 s"):
        ask(chat_server, 1)


@pytest.mark.parametrize(
    "url", ["https://me:secret@host/v1", "https://host/v1?key=secret", "https://host/api", "ftp:/v1"]
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_the_key_is_not_in_the_words_for_an_endpoint() -> None:
    assert KEY not in repr(Endpoint(url="http://127.0.0.1/v1", model="big", key=KEY))
