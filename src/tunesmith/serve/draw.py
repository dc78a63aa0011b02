"""Pairs that are drawn: for each prompt one answer from each of two models, or two answers of one model.

Answers are kept chunk by chunk, so that a stopped drawing goes on where it was and ends with the same answers: the
random numbers of a chunk depend on its prompts, on the side and on the try.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from ..data.layout import content_id
from ..data.read import read
from ..data.render import prompt_tokens, refuse_unwritten
from ..data.split import prompt_key, split
from ..errors import DataError, FolderError
from ..model.load import Model, load
from ..model.sample import Sampling, sample
from ..recipe import Recipe
from ..screen import Screen
from ..types import Completion, Conversation, Message, Row
from ..world import World
from .choices import Pair, Side, add_drawn, keep_note, read_drawn

CHUNK = 32  # prompts whose answers are kept at once
TRIES = 4  # for a second answer of one model that differs from the first
MAX_NEW_TOKENS = 256
TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One prompt of the recipe's training rows."""

    id: str
    prompt: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...]


def draw_pairs(
    recipe: Recipe, models: tuple[str, str], count: int, store: sqlite3.Connection, screen: Screen
) -> dict[str, int]:
    """Let `models` answer the first `count` training prompts, and store the pairs whose answers differ.

    Returns how many prompts have a pair, equal answers, or are too long. Raises FolderError if the folder's pairs were
    drawn from other models, DataError if no row asks anything.
    """
    told = keep_note(store, "models", json.dumps(models))
    if told != json.dumps(models):
        what = f"this folder's pairs were drawn from {' and '.join(dict.fromkeys(json.loads(told)))}"
        raise FolderError(what, where="--model", fix="Choose another --out for other models.")
    asked = asked_prompts(recipe)[:count]
    if len(asked) < count:
        screen.warn(f"the training rows have {len(asked)} different prompts, not {count}")
    if with_tools := sum(bool(one.tools) for one in asked):
        screen.warn(f"{with_tools} prompts have tools, which raters do not see and exported choices leave out")
    how = Sampling(max_new_tokens=recipe.task.max_new_tokens or MAX_NEW_TOKENS, temperature=TEMPERATURE, batch=CHUNK)
    model, loaded = None, ""
    for side, name in zip(get_args(Side), models, strict=True):
        drawn = read_drawn(store, side)
        if all(one.id in drawn for one in asked):
            continue
        if model is None or loaded != name:
            model = None  # one model in memory at a time
            model, loaded = load(name, World()), name
        _draw_side(side, model, models, asked, how, store, screen)
    return _count(asked, store, screen, how)


def asked_prompts(recipe: Recipe) -> list[Asked]:
    """The different prompts of the training rows, in an order that depends on their content and data.seed."""
    spec = recipe.data
    found: dict[str, Asked] = {}
    for row in split(read(spec.train, spec), spec).train:
        if any(message.content.strip() for message in row.prompt):
            found.setdefault(prompt_key(row), Asked(id=prompt_key(row), prompt=row.prompt, tools=_tools(row)))
    if not found:
        raise DataError("no training row has a prompt", where=spec.train, fix="Give rows that ask something.")
    return list(found.values())


def _tools(row: Row) -> tuple[Mapping[str, object], ...]:
    return row.tools if isinstance(row, Conversation) else ()


def _draw_side(
    side: Side,
    model: Model,
    models: tuple[str, str],
    asked: Sequence[Asked],
    how: Sampling,
    store: sqlite3.Connection,
    screen: Screen,
) -> None:
    """Draw and keep this side's answers; with the second side also the pairs."""
    first = {name: text for name, (text, _) in read_drawn(store, "a").items()} if side == "b" else {}
    drawn = read_drawn(store, side)
    room = model.vocabulary.context_tokens - how.max_new_tokens
    name = models[0] if side == "a" else models[1]
    with screen.progress(f"answers of {name}", len(asked)) as tick:
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            for one in chunk:
                refuse_unwritten(one.prompt, one.tools, model.tokenizer, name)
            tokens = {one.id: np.array(prompt_tokens(one.prompt, model.tokenizer, one.tools)) for one in chunk}
            todo = [one for one in chunk if one.id not in drawn and len(tokens[one.id]) <= room]
            # Two models are compared as they are; one model that repeats itself is asked again.
            tries = 1 if models[0] != models[1] else TRIES
            answers = _answers(model, [(one.id, tokens[one.id]) for one in todo], first, how, (side, tries))
            pairs = [
                Pair(prompt=one.prompt, a=a, b=b, model_a=models[0], model_b=models[1])
                for one in todo
                if one.id in first and (a := _assistant(first[one.id])) != (b := _assistant(answers[one.id].text))
            ]
            kept = {key: (answer.text, answer.stop == "length") for key, answer in answers.items()}
            add_drawn(store, side, kept, pairs)
            tick(start + len(chunk))


def _answers(
    model: Model,
    prompts: Sequence[tuple[str, np.ndarray]],
    unlike: Mapping[str, str],
    how: Sampling,
    side_and_tries: tuple[Side, int],
) -> dict[str, Completion]:
    """One answer for each prompt, drawn again a few times where it equals the text of `unlike`."""
    side, tries = side_and_tries
    answers: dict[str, Completion] = {}
    for attempt in range(tries):
        todo = [(key, tokens) for key, tokens in prompts if key not in answers or answers[key].text == unlike.get(key)]
        if not todo:
            break
        seed = int(content_id([key for key, _ in prompts], side, attempt), 16) >> 2
        found = sample(model, [tokens for _, tokens in todo], replace(how, seed=seed))
        answers |= {key: answer for (key, _), answer in zip(todo, found, strict=True)}
    return answers


def _count(asked: Sequence[Asked], store: sqlite3.Connection, screen: Screen, how: Sampling) -> dict[str, int]:
    first, second = read_drawn(store, "a"), read_drawn(store, "b")
    whole = [one.id for one in asked if one.id in first and one.id in second]
    equal = sum(first[name][0] == second[name][0] for name in whole)
    cut = sum(first[name][1] + second[name][1] for name in whole)
    long = len(asked) - len(whole)
    if equal:
        screen.warn(f"{equal} prompts got equal answers twice, and nobody is asked about them")
    if cut:
        fix = "set task.max_new_tokens in the recipe for longer ones"
        screen.warn(f"{cut} of {2 * len(whole)} answers were cut at {how.max_new_tokens} tokens; {fix}")
    if long:
        screen.warn(f"{long} prompts are too long for the model with an answer of {how.max_new_tokens} tokens")
    return {"pairs": len(whole) - equal, "equal": equal, "too long": long}


def _assistant(text: str) -> Message:
    return Message(role="assistant", content=text)
