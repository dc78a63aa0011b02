"""Graders as clients describe them, and the file that a job's worker calls for rewards.

`string_check` and `text_similarity` are computed by our own code. `python` runs what the client sent with the rights of
this server, so it is refused unless whoever started the server allowed it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from ..evaluate.graders import ANSWER, GRADE, places
from .bodies import Body, Name
from .problems import Problem

MOST_CHARACTERS = 65536
GRADER_FILE = "grader.py"
Text = Annotated[str, StringConstraints(max_length=MOST_CHARACTERS)]


class _OfText(Body):
    """Compares two texts; each may hold places."""

    name: Name
    input: Text
    reference: Text

    @field_validator("input", "reference")
    @classmethod
    def _known_places(cls, text: str) -> str:
        for name in places(text):
            if name != ANSWER and not (name.startswith("item.") and all(name.split("."))):
                raise ValueError(
                    f"{{{{ {name[:64]} }}}} is not filled in; write {{{{ {ANSWER} }}}} or {{{{ item.NAME }}}}"
                )
        return text


class StringCheck(_OfText):
    """1 or 0."""

    type: Literal["string_check"]
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(_OfText):
    """From 0 to 1."""

    type: Literal["text_similarity"]
    evaluation_metric: Literal["fuzzy_match", "bleu", "rouge_l"]


class PythonGrader(Body):
    """`grade(sample, item)` of the client's own."""

    type: Literal["python"]
    name: Name
    source: Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]
    image_tag: None = None

    @field_validator("source")
    @classmethod
    def _loads(cls, source: str) -> str:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"not Python: {error}") from None
        if not any(isinstance(node, ast.FunctionDef) and node.name == "grade" for node in tree.body):
            raise ValueError("define grade(sample, item)")
        return source


Grader = Annotated[StringCheck | TextSimilarity | PythonGrader, Field(discriminator="type")]


def allow(grader: Mapping[str, Any], *, python: bool) -> None:
    """Raise Problem for a grader that this server does not run."""
    if grader["type"] == "python" and not python:
        what = "this server runs no Python graders; whoever starts it may allow them with --python-graders"
        raise Problem(400, what, param="method", code="grader_not_allowed")


def places_of(grader: Mapping[str, Any]) -> list[str]:
    """What a grader wants of every row, by the names in its places."""
    texts = [grader[name] for name in ("input", "reference") if name in grader]
    return [name for text in texts for name in places(text) if name != ANSWER]


def grader_file(grader: Mapping[str, Any]) -> str:
    """The text of grader.py."""
    if grader["type"] == "python":
        call = 'grade({"output_text": answer, "output_tools": []}, dict(item.extra))'
        return f"{grader['source']}\n\n\ndef {GRADE}(answer, item):\n    return {call}\n"
    about = '"""The grader of a fine-tuning job, as it was asked for."""'
    return f"{about}\n\nfrom tunesmith.evaluate.graders import grade\n\n{GRADE} = grade({dict(grader)!r})\n"
