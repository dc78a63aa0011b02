"""A recipe as it is written: a YAML file and what `--set` changes in it, and where each key stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError

_DATA = {".jsonl", ".csv", ".tsv", ".parquet", ".gz"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The values of a recipe's keys; `places` has by dotted key (numbers in lists) `file:line` or `--set KEY`."""

    values: dict[str, Any]
    places: dict[str, str]


def written(path: Path, overrides: tuple[str, ...] = ()) -> Written:
    """Read a YAML mapping and apply `key.sub=value` overrides. Raises RecipeError that names the file or override."""
    _refuse_others(path)
    values, places = _read_yaml(path)
    if not isinstance(values, dict):
        raise RecipeError(
            "a recipe is a mapping of keys", where=str(path), fix="Start from recipes/legal_citations.yaml."
        )
    for override in overrides:
        key = _apply(values, override)
        places = {other: place for other, place in places.items() if not other.startswith(f"{key}.")}
        places[key] = f"--set {key}"
    return Written(values=values, places=places)


def _refuse_others(path: Path) -> None:
    """What is given in a recipe's place: nothing, a run folder, or the data."""
    if (path / "recipe.yaml").is_file():
        fix = f"Name the recipe that it was made from, to go on; `tunesmith report {path}` shows what came out."
        raise RecipeError("this is a run folder", where=str(path), fix=fix)
    if not path.is_file():
        raise RecipeError("no such recipe", where=str(path), fix="Give the path of a YAML recipe; see recipes/.")
    if path.suffix in _DATA:
        fix = f"Write a recipe, a YAML file, that names them:\ndata: {{train: {path}}}\ntask: {{metric: exact_match}}"
        raise RecipeError("these are data, not a recipe", where=str(path), fix=fix)


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                what = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[Any, dict[str, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path), fix="Check its permissions.") from None
    try:
        loader = _OnceLoader(data.decode("utf-8"))
        loader.name = str(path)  # what its errors call the text
        root = loader.get_single_node()
        places = {key: f"{path}:{line}" for key, line in _lines(root)}
        return None if root is None else loader.construct_document(root), places
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError("not UTF-8", where=f"{path}:{line}", fix="Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise RecipeError(f"not valid YAML: {error}", where=str(path), fix="Mend the line named above.") from None


def _lines(node: yaml.Node | None, above: str = "") -> Iterator[tuple[str, int]]:
    """Each dotted key below a node and its line, from 1."""
    below: list[tuple[yaml.Node, str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        below = [(key, str(key.value), value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(value, str(place), value) for place, value in enumerate(node.value)]
    for marked, name, value in below:
        yield above + name, marked.start_mark.line + 1
        yield from _lines(value, f"{above}{name}.")


def _apply(values: dict[str, Any], override: str) -> str:
    """Set one dotted key in `values` from `key=value`, where the value is read as YAML; returns the key."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"cannot read the override {override!r}", where="--set", fix="Write --set train.epochs=2.")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"{parent!r} holds a value, not keys", where=f"--set {key}", fix="Check the dotted name.")
    try:
        node[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(
            f"cannot read the value {value!r}", where=f"--set {key}", fix="Quote it as in YAML."
        ) from None
    if isinstance(node[leaf], str):
        node[leaf] = _number(node[leaf])
    return key


def _number(text: str) -> float | str:
    """YAML reads `1e-3` as text; a number is what was meant."""
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text) else text
