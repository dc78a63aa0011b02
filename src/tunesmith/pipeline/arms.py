"""The arms of the comparison: prompts chosen on validation rows, then every arm once over the test rows.

An arm whose answers are in the run folder is not asked again, so a killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.render import as_dict
from ..evaluate.lookup import majority, nearest_neighbour
from ..evaluate.measure import looked_up, measure
from ..evaluate.metrics import higher_is_better
from ..evaluate.systems import Prompting, candidates, takes_system
from ..folder import RunFolder, read_json, read_jsonl, write_json, write_jsonl
from ..model.load import Model
from ..model.sample import Sampling
from ..recipe import Recipe
from ..screen import Screen
from ..types import Conversation, Grade, Item, Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The prompted arms that go to the test rows, and which of them did best on validation rows."""

    arms: tuple[Prompting, ...]
    best: str
    shots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How every arm is asked and graded."""

    grades: Mapping[str, Grade]
    metric: str
    how: Sampling
    choices: tuple[str, ...] = ()


def select_prompts(
    recipe: Recipe,
    model: Model,
    train: Sequence[Conversation],
    items: Sequence[Item],
    asking: Asking,
    folder: RunFolder,
    screen: Screen,
) -> Selected:
    """Try placements of the instructions and numbers of shots on validation rows; keep the best of each kind."""
    path = folder.path / "selection.json"
    base = Prompting(name="base")
    options = [base, *_options(recipe, model, train)]
    tried = read_json(path)["tried"] if path.is_file() else []
    if not tried:
        with screen.progress("choosing prompts on validation rows", len(options)) as tick:
            for done, option in enumerate(options, 1):
                found = measure(
                    model,
                    option,
                    items,
                    {asking.metric: asking.grades[asking.metric]},
                    asking.how,
                    choices=asking.choices,
                )
                value = float(np.mean(found.scores[asking.metric]))
                tried.append(
                    {
                        "arm": option.name,
                        "placement": option.placement,
                        "shots": [row.id for row in option.shots],
                        "valid": value,
                    }
                )
                tick(done, f"{option.name} {value:.3f}")
        write_json(path, {"metric": asking.metric, "rows": len(items), "tried": tried})
    sign = 1.0 if higher_is_better(asking.metric) else -1.0
    scores = [sign * float(trial["valid"]) for trial in tried]
    chosen = [_best(name, options, scores) for name in dict.fromkeys(option.name for option in options)]
    winner = max(chosen, key=lambda place: (scores[place], place))
    for place in chosen:
        option = options[place]
        told = (
            f"{len(option.shots)} shots"
            if option.shots
            else f"instructions as {option.placement} turn"
            if option.instructions
            else "prompt alone"
        )
        screen.line(
            f"{option.name}: {told}, {asking.metric} {tried[place]['valid']:.3f} on {len(items)} validation rows"
        )
    arms = tuple(options[place] for place in chosen)
    few_shot = next((len(arm.shots) for arm in arms if arm.name == "few_shot"), 0)
    return Selected(arms=arms, best=options[winner].name, shots=few_shot)


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
            return measure(
                model, prompting, items, dict(asking.grades), asking.how, arm=arm, choices=asking.choices, progress=tick
            )

    return _once(arm, items, folder, fresh)


def look_up(
    train: Sequence[Conversation], items: Sequence[Item], asking: Asking, folder: RunFolder
) -> dict[str, Measurement]:
    """The arms that need no model: copy the nearest training row's answer; give the commonest answer."""
    functions: dict[str, Callable[..., list[str]]] = {"nearest_neighbour": nearest_neighbour, "majority": majority}
    return {
        arm: _once(arm, items, folder, lambda arm=arm, f=f: looked_up(arm, f(train, items), items, dict(asking.grades)))
        for arm, f in functions.items()
    }


def _options(recipe: Recipe, model: Model, train: Sequence[Conversation]) -> list[Prompting]:
    task = recipe.task
    if not task.instructions and not task.shots:
        return []
    system = takes_system(model.tokenizer)
    return candidates(task.instructions, task.shots, train, seed=recipe.evaluate.seed, allow_system=system)


def _best(name: str, options: Sequence[Prompting], scores: Sequence[float]) -> int:
    """The best option of a kind; among equals the one that shows the model most."""
    places = [place for place, option in enumerate(options) if option.name == name]
    return max(places, key=lambda place: (scores[place], len(options[place].shots), -place))


def _once(arm: str, items: Sequence[Item], folder: RunFolder, fresh: Callable[[], Measurement]) -> Measurement:
    path = folder.answers(arm)
    if path.is_file():
        return _read(arm, folder)
    found = fresh()
    lines = [
        {
            "id": item.id,
            "prompt": [as_dict(message) for message in item.prompt],
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


def _read(arm: str, folder: RunFolder) -> Measurement:
    lines = read_jsonl(folder.answers(arm))
    return Measurement(
        arm=arm,
        ids=tuple(line["id"] for line in lines),
        answers=tuple(line["answer"] for line in lines),
        scores={key: np.array([line["scores"][key] for line in lines]) for key in lines[0]["scores"]},
        prompt_tokens=np.array([line["prompt_tokens"] for line in lines]),
        completion_tokens=np.array([line["completion_tokens"] for line in lines]),
        seconds=float(sum(line["seconds"] for line in lines)),
    )
