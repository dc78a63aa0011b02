"""The whole job, top to bottom: from a base model and a file of examples to a tuned model with evidence.

    tunesmith run recipes/legal_citations.yaml

Each stage leaves its result in the run folder, so the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.read import read_choices
from ..errors import RecipeError
from ..evaluate.forgetting import Forgetting, Remembered, forgotten, remember
from ..evaluate.metrics import higher_is_better
from ..evaluate.systems import Prompting
from ..folder import RunFolder, write_json
from ..model.load import Model
from ..model.sample import Sampling
from ..recipe import Recipe, Update
from ..screen import Screen
from ..train.meter import machine
from ..types import Item, Measurement
from ..world import World
from .arms import TEACHER, Asking, Selected, ask, grade_teacher, look_up, select_prompts
from .begin import Place, checked, finished, load_base, opened
from .dpo import learn_from_choices
from .forecast import what_rows_show
from .policy import learn_from_rewards
from .prepare import Prepared, prepare
from .results import Findings, conclude
from .reward import learn_reward
from .tune import Material, tune


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a run works with, read and checked before there is a run folder."""

    place: Place
    data: Prepared
    retention: Sequence[Item]
    asking: Asking
    taught: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What the base model can do with prompts alone, and what must not be forgotten. Known to the first rank."""

    selected: Selected
    measured: Mapping[str, Measurement]
    remembered: Remembered | None
    product_parameters: int
    head_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class After:
    """One tuned model: what training took, and on the first rank how it did on the test rows."""

    train: Mapping[str, Any]
    valid_metric: float
    measured: Measurement | None
    forgetting: Forgetting | None


def run(
    recipe: Recipe,
    world: World | None = None,
    *,
    screen: Screen | None = None,
    root: Path = Path(),
    taught: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Do everything the recipe asks for and return the run folder; a finished run is returned as it is.

    `root` is where the recipe's own files (metrics in file.py) are looked up. `taught` comes from pipeline/distill.py:
    what collecting a teacher's answers took. Raises TunesmithError.
    """
    world, screen = world or World(), screen or Screen(quiet=True)
    if recipe.task.teacher.by and taught is None:
        fix = "Use `tunesmith distill`, or leave `task.teacher` out."
        raise RecipeError("the recipe has a teacher, whose answers come first", where="task.teacher", fix=fix)
    started = time.monotonic()
    folder = RunFolder(path=Path(recipe.out or "runs/run"))
    if finished(folder, recipe, world, root):
        screen.line(f"{folder.path} is finished; to run again, delete it or choose another `out`")
        if world.leads and not folder.report.is_file():  # the process ended before it, or somebody deleted the page
            _report(folder)
        return folder
    place = Place(recipe=recipe, folder=folder, root=root, world=world, screen=screen, started=started)
    match recipe.method:
        case "sft":
            _supervised(place, taught)
        case "reward":
            learn_reward(place)
        case "dpo":
            learn_from_choices(place)
        case "ppo" | "grpo":
            learn_from_rewards(place)
    if world.leads:
        _report(folder)
    world.barrier()
    return folder


def _report(folder: RunFolder) -> None:
    from ..report.page import write_report  # here, as matplotlib takes a second, and the first step waits

    write_report(folder.path)


def _supervised(place: Place, taught: Mapping[str, Any] | None) -> None:
    """Imitate examples, and compare with the base model and its best prompts, or with the teacher."""
    job, base = _read(place, taught)
    world = place.world
    with opened(place, job.data.ledger, {**_facts(job), "base_notes": base.notes}):
        before = _baselines(job, base) if world.leads else None
        del base
        world.barrier()
        after = {update: _tuned(job, update, before) for update in place.recipe.update}
        if before:
            place.screen.stage("Verdict")
            found = _findings(job, before, after, seconds=time.monotonic() - place.started)
            write_json(place.folder.results, conclude(place.recipe, found))
        world.barrier()


def _read(place: Place, taught: Mapping[str, Any] | None) -> tuple[Job, Model]:
    """Everything that can be wrong with the recipe, its files or its base shows here, before a folder is made."""
    recipe, screen = place.recipe, place.screen
    grades = checked(recipe, place.root, screen)
    retention = read_choices(recipe.evaluate.retention) if recipe.evaluate.retention else []
    base = load_base(recipe, place.world, screen)
    screen.stage("Data", recipe.data.train)
    data = prepare(recipe, base.vocabulary, screen)
    screen.line(what_rows_show(recipe, len(data.test_items))[1])
    how = Sampling(max_new_tokens=data.max_new_tokens, batch=recipe.evaluate.batch)
    asking = Asking(grades=grades, metric=recipe.task.metric, how=how)
    return Job(place=place, data=data, retention=retention, asking=asking, taught=taught), base


def _facts(job: Job) -> dict[str, Any]:
    """What plan.json says of answering questions."""
    return {"smallest_difference": _smallest_difference(job), "max_new_tokens": job.asking.how.max_new_tokens}


def _baselines(job: Job, base: Model) -> Before:
    """The base model's best fair chance and lookups over the test rows, and its general ability."""
    data, asking, recipe, folder, screen = job.data, job.asking, job.place.recipe, job.place.folder, job.place.screen
    screen.stage("Baselines", "the base model's best fair chance, and lookups")
    selected = select_prompts(recipe, base, data, asking, folder, screen)
    asked = {arm.name: ask(arm.name, base, arm, data.test_items, asking, folder, screen) for arm in selected.arms}
    if job.taught is not None:
        asked[TEACHER] = grade_teacher(data.test_items, asking, folder)
    if recipe.evaluate.forgetting:
        screen.line("base: general ability, to tell later what was forgotten")
    return Before(
        selected=selected,
        measured=asked | look_up(data.rows, data.test_items, asking, folder),
        remembered=remember(base, job.retention) if recipe.evaluate.forgetting else None,
        product_parameters=base.product_parameters,
        head_parameters=base.head_weight.numel(),
    )


def _tuned(job: Job, update: Update, before: Before | None) -> After:
    """Train one update; the first rank, which knows what was before, then asks the tuned model the test rows."""
    place, data, asking = job.place, job.data, job.asking
    material = Material(
        train=data.train,
        valid=data.valid,
        valid_items=data.valid_items,
        metric=asking.metric,
        grade=asking.grades[asking.metric],
        how=asking.how,
    )
    place.screen.stage("Training", f"{update} fine-tuning")
    tuned = tune(place, update, material)
    measured = forgetting = None
    if before:
        prompting = Prompting(name=update)
        measured = ask(update, tuned.model, prompting, data.test_items, asking, place.folder, place.screen)
        if before.remembered:
            place.screen.line(f"{update}: general ability")
            forgetting = forgotten(before.remembered, tuned.model)
    return After(train=tuned.train, valid_metric=tuned.valid_metric, measured=measured, forgetting=forgetting)


def _findings(job: Job, before: Before, after: Mapping[str, After], *, seconds: float) -> Findings:
    """All that was measured; the best update by validation is the one that the verdict is about."""
    sign = 1 if higher_is_better(job.asking.metric) else -1
    facts = {
        **job.data.counts,
        "machine": machine(job.place.world.device),
        "smallest_difference": _smallest_difference(job),
        "seconds": seconds,
        **({} if job.taught is None else {"distill": job.taught}),
        **({"untried": list(before.selected.untried)} if before.selected.untried else {}),
    }
    return Findings(
        measurements={**before.measured, **{name: one.measured for name, one in after.items() if one.measured}},
        trained={name: one.train for name, one in after.items()},
        forgetting={name: one.forgetting for name, one in after.items() if one.forgetting},
        best_prompted=before.selected.best if job.taught is None else TEACHER,
        shots=before.selected.shots,
        subject=max(after, key=lambda name: sign * after[name].valid_metric),
        product_parameters=before.product_parameters,
        head_parameters=before.head_parameters,
        facts=facts,
    )


def _smallest_difference(job: Job) -> dict[str, object]:
    rows = len(job.data.test_items)
    explanation = f"the smallest true difference that {rows} paired test rows show with power 80%"
    return {"value": what_rows_show(job.place.recipe, rows)[0], "explanation": explanation}
