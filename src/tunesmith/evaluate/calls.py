"""Function calls as data, so that two ways of writing one call compare equal. Nothing is ever executed.

Read are Python expressions (`client("s3").create_bucket(Bucket="b")`), JSON tool calls
(`{"name": "f", "arguments": {"x": 1}}`, arguments also as a JSON string, as OpenAI's API sends them), and lists of
either. Markup around a call (a code fence, `<tool_call>` tags) is not part of it; several `<tool_call>` blocks, as
models write parallel calls, are a list.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

LONGEST_CALL_CHARACTERS = 20_000
_FENCE = re.compile(r"\A```\w*\s(.*)```\Z", re.DOTALL)
_TOOL_CALL_TAG = re.compile(r"</?tool_call>")
_BETWEEN_TOOL_CALLS = re.compile(r"</tool_call>\s*<tool_call>")
# The parser's own stack limits raise MemoryError and RecursionError; both mean "not a call that anyone wrote".
_UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call: its dotted name as written in Python, and its arguments in order; `None` names a positional one."""

    name: str
    arguments: tuple[tuple[str | None, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """An argument that is an expression, not a plain value: compared by its normalised source."""

    source: str


def parse_json(text: str) -> Any:
    """The value of strict JSON text. Raises ValueError for anything else, NaN and Infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_calls(text: str) -> list[Call] | None:
    """The calls written in `text`, or None where it is anything but one call or a list of calls."""
    calls: list[Call] = []
    for block in _BETWEEN_TOOL_CALLS.split(_unfenced(text)):
        written = _calls_of_block(_unfenced(_TOOL_CALL_TAG.sub("", block)).strip("`").strip())
        if written is None:
            return None
        calls += written
    return calls


def same_call(one: Call, other: Call) -> bool:
    """Same name and same arguments. Keyword order is free.

    A positional argument stands for the name that the other call writes at its place: `f(1, y=2)` equals `f(x=1, y=2)`.
    """
    left, right = _bound(one, other), _bound(other, one)
    return one.name == other.name and left is not None and right is not None and same_value(left, right)


def same_value(one: Any, other: Any) -> bool:
    """Equality of JSON values: key order is free, 1 equals 1.0, but true is not 1. Raises RecursionError when deep."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_value(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return one == other


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unfenced(text: str) -> str:
    text = text.strip()
    fenced = _FENCE.match(text)
    return fenced[1].strip() if fenced else text


def _calls_of_block(text: str) -> list[Call] | None:
    if not text or len(text) > LONGEST_CALL_CHARACTERS:
        return None
    try:
        return _calls_of_json(parse_json(text))
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
            nodes = tree.elts if isinstance(tree, ast.List) else [tree]
            calls = [_call_of_node(node) for node in nodes if isinstance(node, ast.Call)]
            return calls if calls and len(calls) == len(nodes) else None
    except _UNREADABLE:
        return None


def _calls_of_json(value: Any) -> list[Call] | None:
    calls = [_call_of_json(one) for one in (value if isinstance(value, list) else [value])]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) else None


def _call_of_json(value: Any) -> Call | None:
    match value:
        case {"function": {"name": str(name)} as function}:
            arguments = function.get("arguments", {})
        case {"name": str(name)}:
            arguments = value.get("arguments", value.get("parameters", {}))
        case _:
            return None
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError:
            return None
    return Call(name=name, arguments=tuple(arguments.items())) if isinstance(arguments, dict) else None


def _call_of_node(node: ast.Call) -> Call:
    arguments: list[tuple[str | None, Any]] = [(None, _value(argument)) for argument in node.args]
    for keyword in node.keywords:
        value = _value(keyword.value)
        if keyword.arg is None and isinstance(value, dict):
            arguments += [(str(name), inner) for name, inner in value.items()]
        else:
            arguments.append((keyword.arg or "**", value))
    return Call(name=ast.unparse(node.func), arguments=tuple(arguments))


def _value(node: ast.expr) -> Any:
    """A literal's value, with tuples as lists (JSON has no tuples); any other expression as Code."""
    match node:
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {key.value: _value(value) for key, value in zip(keys, values, strict=True)}  # pyright: ignore
        case ast.Constant(value=value):
            return value
    try:
        return ast.literal_eval(node)
    except _UNREADABLE:
        return Code(source=ast.unparse(node))


def _bound(call: Call, other: Call) -> dict[str | int, Any] | None:
    """Arguments by name, or by place where neither call gives a name; None where one is given twice."""
    bound: dict[str | int, Any] = {}
    for place, (name, value) in enumerate(call.arguments):
        other_name = other.arguments[place][0] if place < len(other.arguments) else None
        bound.setdefault(name or other_name or place, value)
    return bound if len(bound) == len(call.arguments) else None
