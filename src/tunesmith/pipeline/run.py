"""The whole job, top to bottom: from a base model and a file of examples to a tuned model with evidence.

    tunesmith run recipes/legal_citations.yaml

Each stage leaves its result in the run folder, so the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..data.read import read_choices
from ..errors import RecipeError
from ..evaluate.forgetting import distributions, general_ability, kl_from_base, neutral_answers
from ..evaluate.metrics import find_metric
from ..evaluate.stats import smallest_difference
from ..evaluate.systems import Prompting
from ..folder import RunFolder, locked, open_run, write_json, write_jsonl
from ..model.load import load
from ..model.sample import Sampling
from ..recipe import Recipe, dump_recipe
from ..report.page import write_report
from ..screen import Screen
from ..train.meter import machine
from ..world import World
from .arms import Asking, ask, look_up, select_prompts
from .prepare import prepare
from .results import Findings, Forgetting, conclude
from .tune import Material, tune


def run(
    recipe: Recipe,
    world: World | None = None,
    *,
    screen: Screen | None = None,
    root: Path = Path(),
) -> RunFolder:
    """Do everything the recipe asks for and return the run folder.

    `root` is where the recipe's own files (metrics in file.py) are looked up. Raises TunesmithError.
    """
    world, screen = world or World(), screen or Screen(quiet=True)
    if recipe.method != "sft":
        raise RecipeError(f"method {recipe.method} is not built yet", where="method", fix="Use method: sft.")
    folder = open_run(Path(recipe.out or "runs/run"), dump_recipe(recipe))
    with locked(folder):
        return _run(recipe, folder, world, screen, root)


def _run(recipe: Recipe, folder: RunFolder, world: World, screen: Screen, root: Path) -> RunFolder:
    started = time.monotonic()
    metrics = list(dict.fromkeys([recipe.task.metric, *recipe.task.also]))
    grades = {name: find_metric(name, recipe.task, root) for name in metrics}

    screen.stage("Base model", recipe.base)
    base = load(recipe.base, world)
    for note in base.notes:
        screen.warn(note)
    screen.line(
        f"{base.parameters / 1e6:.0f} M parameters, context {base.vocabulary.context_tokens:,} tokens, {world.device}"
    )

    screen.stage("Data", recipe.data.train)
    data = prepare(recipe, base.vocabulary, screen)
    write_jsonl(folder.ledger, data.ledger)
    how = Sampling(max_new_tokens=data.max_new_tokens, batch=recipe.evaluate.batch)
    asking = Asking(grades=grades, metric=recipe.task.metric, how=how, choices=tuple(recipe.task.choices or ()))
    shown = smallest_difference(len(data.test_items), recipe.evaluate.level)
    screen.line(
        f"{len(data.test_items)} test rows can show a difference of {100 * shown:.1f} points (level {recipe.evaluate.level:.0%}, power 80 %)"
    )
    if not folder.plan.is_file():
        write_json(
            folder.plan,
            {
                "machine": machine(world.device),
                "derived": [],
                "arms": {},
                "smallest_difference": _difference(shown, len(data.test_items)),
            },
        )

    screen.stage("Baselines", "the base model's best fair chance, and lookups")
    selected = select_prompts(recipe, base, data.rows, data.valid_items, asking, folder, screen)
    measured = {arm.name: ask(arm.name, base, arm, data.test_items, asking, folder, screen) for arm in selected.arms}
    measured |= look_up(data.rows, data.test_items, asking, folder)
    retention = read_choices(recipe.evaluate.retention) if recipe.evaluate.retention else []
    if recipe.evaluate.forgetting:
        before = general_ability(base, retention)
        neutral = neutral_answers(base)
        reference = distributions(base, neutral)
    parameters = base.product_parameters
    del base

    material = Material(
        train=data.train,
        valid=data.valid,
        valid_items=data.valid_items,
        metric=recipe.task.metric,
        grade=grades[recipe.task.metric],
        how=how,
    )
    trained, forgetting, valid = {}, {}, {}
    for update in recipe.update:
        screen.stage("Training", f"{update} fine-tuning")
        tuned = tune(recipe, update, material, folder, world, screen)
        trained[update], valid[update] = tuned.train, tuned.valid_metric
        measured[update] = ask(update, tuned.model, Prompting(name=update), data.test_items, asking, folder, screen)
        if recipe.evaluate.forgetting:
            kl = kl_from_base(reference, distributions(tuned.model, neutral))
            forgetting[update] = Forgetting(before=before, after=general_ability(tuned.model, retention), kl=kl)
        del tuned

    screen.stage("Verdict")
    found = Findings(
        measurements=measured,
        trained=trained,
        forgetting=forgetting,
        best_prompted=selected.best,
        shots=selected.shots,
        subject=max(recipe.update, key=lambda update: valid[update]),
        product_parameters=parameters,
        facts={
            **data.counts,
            "machine": machine(world.device),
            "smallest_difference": _difference(shown, len(data.test_items)),
            "seconds": time.monotonic() - started,
        },
    )
    write_json(folder.results, conclude(recipe, found))
    write_report(folder.path)
    return folder


def _difference(value: float, rows: int) -> dict[str, object]:
    return {
        "value": value,
        "explanation": f"the smallest true difference that {rows} paired test rows show with power 80 %",
    }
