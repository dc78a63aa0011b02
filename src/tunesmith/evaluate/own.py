"""The user's own metric or reward, `file.py:function`: loaded from a local file, called per item, checked.

The file is run as an import would run it: it is the user's own code, named in the user's own recipe. Whatever goes
wrong in it becomes one sentence with file, function, line and item.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..types import Grade, Item


def own_grade(name: str, root: Path) -> Grade:
    """The Grade of `file.py:function`, which is called as function(answer: str, item: Item) -> float | bool, or with
    the reference alone where its second parameter is called `reference`.

    Raises RecipeError as load_function does; its Grade raises one where the function fails or returns no finite number.
    """
    function = load_function(name, root)

    def grade(items: Sequence[Item], answers: Sequence[str]) -> list[float]:
        return [_score(name, function, item, answer) for item, answer in zip(items, answers, strict=True)]

    return grade


def load_function(name: str, root: Path) -> Callable[..., Any]:
    """The function named `file.py:function`, its file relative to `root` (the recipe's folder).

    Raises RecipeError where the file is absent, fails to load, or has no such function with such parameters.
    """
    file, _, function_name = name.rpartition(":")
    path = (root / file).resolve()
    if not path.is_file():
        raise RecipeError("no such file", where=name, fix=f"Looked for {path}; paths are relative to the recipe.")
    spec = importlib.util.spec_from_file_location(f"tunesmith_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError("not a Python file", where=name, fix="Name a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"the file fails to load: {_raised(error, path)}", where=name, fix="Mend the file."
        ) from error
    return _function_of(module, function_name, name)


def _function_of(module: ModuleType, function_name: str, name: str) -> Callable[..., Any]:
    function = vars(module).get(function_name)
    if callable(function):
        second = _second_parameter(function)
        if second not in ("reference", "item", "") and not second.startswith("_"):
            what = f"the second parameter is called {second!r}, which may mean either"
            fix = "Call it reference, to get the right answer as text, or item, to get .reference, .prompt and .extra."
            raise RecipeError(what, where=name, fix=fix)
        return _of_reference(function) if second == "reference" else function
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(function_name, known, n=1, cutoff=0.4)
    fix = f"Did you mean {near[0]!r}?" if near else f"The file defines: {', '.join(known) or 'no function'}."
    raise RecipeError(f"no function {function_name!r} in the file", where=name, fix=fix)


def _second_parameter(function: Callable[..., Any]) -> str:
    try:
        return [*inspect.signature(function).parameters, "", ""][1]
    except (TypeError, ValueError):  # some built-in functions say nothing of themselves
        return ""


def _of_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(answer: str, item: Item) -> Any:
        return function(answer, item.reference)

    return called


def _score(name: str, function: Callable[..., Any], item: Item, answer: str) -> float:
    where = f"{name}, item {item.id}"
    try:
        score = function(answer, item)
    except Exception as error:
        inner = inspect.unwrap(function)
        path = Path(inner.__code__.co_filename) if isinstance(inner, type(_score)) else None
        raise RecipeError(
            f"the function fails: {_raised(error, path)}", where=where, fix="Mend the function."
        ) from error
    if not isinstance(score, (numbers.Real, np.bool_)) or not math.isfinite(float(score)):
        fix = "Return a finite number or a bool."
        raise RecipeError(f"the function returned {score!r:.60}", where=where, fix=fix)
    return float(score)


def _raised(error: BaseException, path: Path | None) -> str:
    """What was raised, and at which line of the user's file where one of its lines was running."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    line = next((frame.lineno for frame in frames if path is not None and frame.filename == str(path)), None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")
