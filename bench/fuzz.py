"""Requests that nobody would write, made by schemathesis from a running server's own OpenAPI description.

    python bench/fuzz.py http://127.0.0.1:8000 --requests 10000

Half of them fit the description and half do not; of each kind, half ask for a model that is served. Prints how many
got which status as one JSON line, and ends with 1 if any got a 5xx or no answer, or if the server is unwell after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import hypothesis
import hypothesis.errors
import requests
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode


def fuzz(url: str, most_requests: int, seed: int) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Statuses by operation, and the requests that the server failed on."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    models = [model["id"] for model in requests.get(f"{url}/v1/models", timeout=60).json()["data"]]
    operations = [found.ok() for found in schema.get_all_operations()]
    jobs = [(operation, mode) for operation in operations for mode in GenerationMode]
    statuses: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []
    for operation, mode in jobs:
        number = count()
        tried = partial(_try, url, models[0], statuses, failed, operation, mode, number)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=-(-most_requests // len(jobs)),
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            tried(case)  # noqa: B023 - called before the loop goes on

        with suppress(hypothesis.errors.Unsatisfiable):  # nothing to be wrong in a request without parameters
            ask()
    return statuses, failed


def _try(
    url: str,
    model: str,
    statuses: Counter[str],
    failed: list[dict[str, Any]],
    operation: Any,
    mode: GenerationMode,
    number: Iterator[int],
    case: Any,
) -> None:
    """Send one request and count what came back."""
    if isinstance(case.body, dict) and "model" in case.body and next(number) % 2:
        case.body["model"] = model
    try:
        status = case.call(base_url=url, timeout=120).status_code
    except requests.RequestException as error:
        status, case.body = 599, [str(error), repr(case.body)]
    statuses[f"{operation.method} {operation.path} {mode.value} {status}"] += 1
    if status >= 500:
        failed.append({"path": operation.path, "status": status, "body": repr(case.body)[:2000]})


def main() -> None:
    """Fuzz and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    how = parser.parse_args()
    statuses, failed = fuzz(how.url, how.requests, how.seed)
    well = requests.get(f"{how.url}/health", timeout=60).status_code == 200
    total = sum(statuses.values())
    print(json.dumps({"requests": total, "failed": failed, "well": well, "statuses": dict(sorted(statuses.items()))}))
    sys.exit(bool(failed) or not well)


if __name__ == "__main__":
    main()
