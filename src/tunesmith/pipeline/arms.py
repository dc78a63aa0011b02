"""The arms of the comparison: prompts chosen on validation rows, then every arm once over the test rows.

An arm whose answers are in the run folder is not asked again, so a killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.layout import as_dict
from ..data.render import prompt_tokens
from ..evaluate.lookup import majority, nearest_neighbour
from ..evaluate.measure import looked_up, measure
from ..evaluate.metrics import MODEL_METRICS, higher_is_better
from ..evaluate.systems import Prompting, candidates, takes_system
from ..folder import RunFolder, read_json, read_jsonl, write_json, write_jsonl
from ..model.load import Model
from ..model.sample import Sampling
from ..recipe import Recipe
from ..screen import Screen
from ..types import Conversation, Grade, Item, Measurement
from .prepare import Prepared

TEACHER = "teacher"  # the arm, and the column of test rows that holds its answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The prompted arms that go to the test rows, and which of them did best on validation rows.

    `untried` says which prompts the model's context has no room for.
    """

    arms: tuple[Prompting, ...]
    best: str
    shots: int
    untried: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How every arm is asked and graded; `metric` decides."""

    grades: Mapping[str, Grade]
    metric: str
    how: Sampling


def select_prompts(
    recipe: Recipe, model: Model, data: Prepared, asking: Asking, folder: RunFolder, screen: Screen
) -> Selected:
    """Try placements of the instructions and numbers of shots on validation rows; keep the best of each kind."""
    fit, untried = _options(recipe, model, data)
    for told in untried:
        screen.warn(told)
    options = [Prompting(name="base"), *fit]
    found = _tried(options, model, data.valid_items, asking, folder, screen)
    sign = 1.0 if higher_is_better(asking.metric) else -1.0
    scores = [sign * value for value in found]
    chosen = [_best(name, options, scores) for name in dict.fromkeys(option.name for option in options)]
    # A tie goes to the shorter prompt, so that no saving is claimed over tokens that bought nothing.
    winner = max(chosen, key=lambda place: (scores[place], -place))
    for place in chosen:
        seen = f"{asking.metric} {found[place]:.3f} on {len(data.valid_items)} validation rows"
        screen.line(f"{options[place].name}: {_told(options[place])}, {seen}")
    arms = tuple(options[place] for place in chosen)
    few_shot = next((len(arm.shots) for arm in arms if arm.name == "few_shot"), 0)
    return Selected(arms=arms, best=options[winner].name, shots=few_shot, untried=untried)


def ask(
    arm: str,
    model: Model,
    prompting: Prompting,
    items: Sequence[Item],
    asking: Asking,
    folder: RunFolder,
    screen: Screen,
) -> Measurement:
    """One arm over the test rows, from the run folder if it is there."""

    def fresh() -> Measurement:
        with screen.progress(f"{arm}: answering test rows", len(items)) as tick:
            return measure(model, prompting, items, dict(asking.grades), asking.how, arm=arm, progress=tick)

    return _once(arm, items, folder, fresh)


def grade_teacher(items: Sequence[Item], asking: Asking, folder: RunFolder) -> Measurement:
    """The teacher's answers to the test rows, which pipeline/distill.py wrote beside them, as an arm."""
    said: list[Any] = [item.extra[TEACHER] for item in items]

    def graded() -> Measurement:
        found = looked_up(TEACHER, [one["answer"] for one in said], items, dict(asking.grades))
        return replace(
            found,
            prompt_tokens=np.array([one["prompt_tokens"] for one in said]),
            completion_tokens=np.array([one["completion_tokens"] for one in said]),
            seconds=float(sum(one["seconds"] for one in said)),
        )

    return _once(TEACHER, items, folder, graded)


def look_up(
    train: Sequence[Conversation], items: Sequence[Item], asking: Asking, folder: RunFolder
) -> dict[str, Measurement]:
    """The arms that need no model: copy the nearest training row's answer; give the commonest answer.

    There are none where no metric grades answers, or where training rows are plain text.
    """
    if set(asking.grades) <= MODEL_METRICS or not all(row.prompt for row in train):
        return {}
    functions: dict[str, Callable[..., list[str]]] = {"nearest_neighbour": nearest_neighbour, "majority": majority}
    return {
        arm: _once(arm, items, folder, lambda arm=arm, f=f: looked_up(arm, f(train, items), items, dict(asking.grades)))
        for arm, f in functions.items()
    }


def _options(recipe: Recipe, model: Model, data: Prepared) -> tuple[list[Prompting], tuple[str, ...]]:
    """Prompted arms that fit the model's context, and of the others why not; none where there is nothing to ask."""
    task, items = recipe.task, [item for item in (*data.valid_items, *data.test_items) if item.prompt]
    if not items:
        return [], ()
    system = takes_system(model.tokenizer)
    found = candidates(task.instructions, task.shots, data.rows, seed=recipe.evaluate.seed, allow_system=system)
    alone = np.array([len(prompt_tokens(item.prompt, model.tokenizer, item.tools)) for item in items])
    longest = items[int(np.argmax(alone))]
    room = model.vocabulary.context_tokens - data.max_new_tokens
    fit: list[Prompting] = []
    untried: list[str] = []
    for option in found:
        # What an option adds is the same for every item, but for a token or two.
        added = len(prompt_tokens(option.messages(longest), model.tokenizer, longest.tools)) - alone.max()
        over = int((alone + added > room).sum())
        if over:
            seen = f"{over} of {len(items)} held-out rows would be longer than the model's context with them"
            first = longest.prompt[-1].content[:40]
            untried.append(f"{option.name}: {_told(option)} left out, as {seen}; the longest of these: {first!r}")
        else:
            fit.append(option)
    return fit, tuple(untried)


def _tried(
    options: Sequence[Prompting],
    model: Model,
    items: Sequence[Item],
    asking: Asking,
    folder: RunFolder,
    screen: Screen,
) -> list[float]:
    """The mean of the deciding metric for each option, from the run folder if the same options were tried before."""
    path = folder.path / "selection.json"
    described = [{"arm": o.name, "placement": o.placement, "shots": [row.id for row in o.shots]} for o in options]
    saved = read_json(path)["tried"] if path.is_file() else []
    if [{key: trial[key] for key in ("arm", "placement", "shots")} for trial in saved] == described:
        return [float(trial["valid"]) for trial in saved]
    grades = {asking.metric: asking.grades[asking.metric]}
    values: list[float] = []
    with screen.progress("choosing prompts on validation rows", len(options)) as tick:
        for option in options:
            found = measure(model, option, items, grades, asking.how)
            values.append(float(np.mean(found.scores[asking.metric])))
            tick(len(values), f"{option.name} {values[-1]:.3f}")
    tried = [{**option, "valid": value} for option, value in zip(described, values, strict=True)]
    write_json(path, {"metric": asking.metric, "rows": len(items), "tried": tried})
    return values


def _told(option: Prompting) -> str:
    """What an option shows the model, in words."""
    if option.shots:
        return f"{len(option.shots)} shots"
    return f"instructions as {option.placement} turn" if option.instructions else "prompt alone"


def _best(name: str, options: Sequence[Prompting], scores: Sequence[float]) -> int:
    """The best option of a kind; among equals the shortest."""
    places = [place for place, option in enumerate(options) if option.name == name]
    return max(places, key=lambda place: (scores[place], -len(options[place].shots), -place))


def _once(arm: str, items: Sequence[Item], folder: RunFolder, fresh: Callable[[], Measurement]) -> Measurement:
    """A measurement from the run folder, if it is of these items, or else a fresh one that is then written there."""
    path = folder.answers(arm)
    saved = read_jsonl(path)
    if saved and [line["id"] for line in saved] == [item.id for item in items]:
        return _read(arm, saved)
    found = fresh()
    lines = [
        {
            "id": item.id,
            "prompt": [as_dict(message) for message in item.prompt],
            **({"tools": [dict(tool) for tool in item.tools]} if item.tools else {}),
            "reference": item.reference,
            "answer": found.answers[place],
            "scores": {name: float(values[place]) for name, values in found.scores.items()},
            "prompt_tokens": int(found.prompt_tokens[place]),
            "completion_tokens": int(found.completion_tokens[place]),
            "seconds": found.seconds / len(items),
        }
        for place, item in enumerate(items)
    ]
    write_jsonl(path, lines)
    return found


def _read(arm: str, lines: Sequence[Mapping[str, Any]]) -> Measurement:
    return Measurement(
        arm=arm,
        ids=tuple(line["id"] for line in lines),
        answers=tuple(line["answer"] for line in lines),
        scores={key: np.array([line["scores"][key] for line in lines]) for key in lines[0]["scores"]},
        prompt_tokens=np.array([line["prompt_tokens"] for line in lines]),
        completion_tokens=np.array([line["completion_tokens"] for line in lines]),
        seconds=float(sum(line["seconds"] for line in lines)),
    )
