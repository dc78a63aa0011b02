"""The process in which a user's reward function runs, so that what hangs or dies in it stops no training.

`python -m tunesmith.evaluate.worker FILE:FUNCTION ROOT` writes one line of JSON when the file is loaded, then reads a
request a line and answers it with a line: {"score": ...}, or {"kind": ..., "error": ...}. What the function prints goes
to stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..data.layout import message_of
from ..errors import RecipeError
from ..types import Grade, Item
from .own import own_grade


def main(name: str, root: Path) -> None:
    """Load the function and answer requests until the last one."""
    requests, replies = _private_pipes()
    try:
        grade = own_grade(name, root)
    except RecipeError as error:
        _reply(replies, {"what": error.what, "where": error.where, "fix": error.fix})
        return
    _reply(replies, {})
    for line in requests:
        request = json.loads(line)
        # Should the parent be killed while the function hangs, nobody else would end this process.
        faulthandler.dump_traceback_later(2 * request["seconds"] + 1, exit=True)
        reply = _graded(grade, item_of(request["item"]), request["answer"])
        faulthandler.cancel_dump_traceback_later()
        _reply(replies, reply)


def item_of(fields: Mapping[str, Any]) -> Item:
    """The Item that `dataclasses.asdict` and JSON took apart."""
    prompt = tuple(map(message_of, fields["prompt"]))
    return Item(**{**fields, "prompt": prompt, "choices": tuple(fields["choices"]), "tools": tuple(fields["tools"])})


def _graded(grade: Grade, item: Item, answer: str) -> dict[str, object]:
    try:
        (score,) = grade([item], [answer])
    except RecipeError as error:
        cause = error.__cause__
        kind = f"raised {type(cause).__name__}" if cause else "returned no finite number"
        return {"kind": kind, "error": error.what}
    return {"score": score}


def _private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Where requests come from and replies go; the function gets an empty stdin, and stderr as its stdout."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def _reply(replies: IO[bytes], reply: Mapping[str, object]) -> None:
    replies.write(json.dumps(reply).encode("ascii") + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
