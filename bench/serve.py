"""A server under load: tokens a second of one stream and of several, and whether a crowd gets what one client gets.

    python bench/serve.py runs/legal_citations runs/other --streams 8 --clients 64 --seconds 600

Starts `tunesmith serve` itself and prints one JSON line. Every reply is greedy; in the crowd each must equal, to the
last bit of its log-probabilities, the reply to a client that was alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

SUBJECTS = ("rivers", "chess", "bread", "bridges", "the moon", "copper", "glaciers", "law", "bees", "radio", "tea")


def question(number: int, models: Sequence[str], tokens: int) -> dict[str, Any]:
    """One of many different requests, of uneven lengths."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    text = f"Question {number}: tell me {'something, anything, ' * (number % 7)}about {subject}."
    messages = [{"role": "user", "content": text}]
    return {"model": models[number % len(models)], "messages": messages, "temperature": 0, "max_tokens": tokens}


@contextmanager
def server(words: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """`tunesmith serve` on a free port; at the end it is told to stop and must end well."""
    command = [sys.executable, "-m", "tunesmith.cli", "serve", *words, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0], psutil.Process(process.pid)
                break
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    assert code == 0, code


def rate(http: httpx.Client, asked: Sequence[dict[str, Any]], side_by_side: int) -> float:
    """Tokens a second over all requests, as streams, so many at a time."""

    def tokens(one: dict[str, Any]) -> int:
        with http.stream("POST", "/v1/chat/completions", json={**one, "stream": True, **usage}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        return events[-1]["usage"]["completion_tokens"]

    usage = {"stream_options": {"include_usage": True}}
    started = time.monotonic()
    with ThreadPoolExecutor(side_by_side) as pool:
        total = sum(pool.map(tokens, asked))
    return total / (time.monotonic() - started)


def crowd(
    http: httpx.Client, asked: Sequence[dict[str, Any]], alone: Sequence[Any], clients: int, seconds: float
) -> dict[str, float]:
    """Clients that ask without a pause, each through the requests in an order of its own."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    replies = wrong = errors = tokens = 0

    def ask(client: int) -> None:
        nonlocal replies, wrong, errors, tokens
        number = client
        while time.monotonic() < end:
            number = (number * 7 + 3 + client) % len(asked)
            response = http.post("/v1/chat/completions", json=asked[number])
            with lock:
                replies += 1
                errors += response.status_code != 200
                if response.status_code == 200:
                    wrong += response.json()["choices"] != alone[number]
                    tokens += response.json()["usage"]["completion_tokens"]

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    took = time.monotonic() - started
    return {"replies": replies, "wrong": wrong, "errors": errors, "tokens_per_second": tokens / took, "seconds": took}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    how = parser.parse_args()
    found: dict[str, Any] = {"runs": [Path(run).name for run in how.runs], "batch": how.batch}
    with server([*how.runs, "--batch", str(how.batch)]) as (url, process):
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=url, timeout=600, limits=limits) as http:
            models = [model["id"] for model in http.get("/v1/models").json()["data"]]
            asked = [question(number, models, how.tokens) for number in range(how.streams)]
            rate(http, asked, how.streams)  # the first requests also make the cache
            one = sorted(rate(http, asked, 1) for _ in range(how.repeats))
            many = sorted(rate(http, asked, how.streams) for _ in range(how.repeats))
            middle = how.repeats // 2
            found |= {"one_stream": one, f"{how.streams}_streams": many, "ratio": many[middle] / one[middle]}
            if how.seconds:
                asked = [{**question(n, models, 8 + 4 * (n % 5)), "logprobs": True} for n in range(how.questions)]
                alone = [http.post("/v1/chat/completions", json=one).json()["choices"] for one in asked]
                before = process.memory_info().rss
                found["crowd"] = crowd(http, asked, alone, how.clients, how.seconds)
                found["crowd"] |= {"clients": how.clients, "rss_bytes": [before, process.memory_info().rss]}
                found["open_files"] = process.num_fds()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
