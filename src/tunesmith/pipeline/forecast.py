"""`tunesmith check` and `plan`: everything that can be said before training, from the data and a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import RecipeError
from ..evaluate.metrics import is_binary
from ..evaluate.stats import smallest_difference
from ..methods.economy import KeptStates, keeps_states, reach
from ..methods.rehearsal import Rehearsal, own_texts
from ..methods.sft import CrossEntropy
from ..model.load import Vocabulary, load, load_vocabulary
from ..recipe import Recipe
from ..screen import Screen
from ..train.meter import machine
from ..train.plan import derive, predict
from ..types import FEWEST_ROWS, Example, LedgerEntry
from ..world import World
from .begin import checked
from .pairs import prepare_pairs
from .prepare import prepare
from .prompts import prepare_prompts
from .tune import attach, steps_of

TIMED_TEXTS = 8


def trained_rows(
    recipe: Recipe, root: Path, vocabulary: Vocabulary, screen: Screen
) -> tuple[Sequence[Example], Sequence[LedgerEntry]]:
    """What a method trains on, as far as it is known before (ppo and grpo draw their own answers), and the ledger."""
    checked(recipe, root, screen)
    if recipe.method == "sft":
        data = prepare(recipe, vocabulary, screen)
        return data.train, data.ledger
    if recipe.method in ("reward", "dpo"):
        pairs = prepare_pairs(recipe, vocabulary, screen)
        return [example for group in pairs.groups["train"] for example in group], pairs.ledger
    prompts = prepare_prompts(recipe, vocabulary, screen)
    return prompts.examples, prompts.ledger


def forecast(recipe: Recipe, root: Path, world: World, screen: Screen) -> None:
    """Print derived values with reasons, predicted cost of each update, and what the test rows can show."""
    if recipe.method != "sft":
        what = f"a run with method {recipe.method} prints its plan when its first steps have been timed"
        raise RecipeError(
            what, where="method", fix="Start it with `tunesmith run`; stop it with Ctrl-C if it is too much."
        )
    checked(recipe, root, screen)
    facts = machine(world.device)
    memory = f"{float(str(facts['memory_bytes'])) / 1e9:.0f} GB"
    screen.stage("Machine", f"{facts['device']}, {facts['threads']} threads, {memory}")
    screen.stage("Data", recipe.data.train)
    data = prepare(recipe, load_vocabulary(recipe.base), screen)
    for update in recipe.update:
        screen.stage("Training", update)
        model = load(recipe.base, world, recipe.weights)
        settings = derive(recipe, update, model, data.train)
        strength = recipe.data.rehearse
        texts = own_texts(model, TIMED_TEXTS, recipe.train.seed) if strength else []
        attach(recipe, model, settings)
        rehearsal = Rehearsal(texts=texts, strength=strength)
        source = steps_of(recipe, settings, data.train, rehearsal, model, world)
        far = reach(source, model)
        cost = predict(model, source, CrossEntropy(), settings, far)
        screen.derived(settings.derived)
        memory = f"{cost.peak_memory_bytes / 1e9:.1f} GB at the peak"
        screen.line(f"{source.steps} steps: about {cost.seconds:.0f} s, {memory}, {cost.flops:.2g} FLOPs{cost.source}")
        if keeps_states(source, model):
            screen.line(KeptStates(source, model, Path()).told)
    screen.stage("Evidence")
    screen.line(what_rows_show(recipe, len(data.test_items))[1])


def what_rows_show(recipe: Recipe, rows: int) -> tuple[float | None, str]:
    """The smallest difference of the deciding metric that so many test rows can show, and a sentence about it.

    Known beforehand for 0/1 scores only; what others show depends on their spread.
    """
    metric, level = recipe.task.metric, recipe.evaluate.level
    if rows < FEWEST_ROWS:
        fix = "give more rows, or a larger data.test"
        return None, f"{rows} test rows carry no verdict, it takes at least {FEWEST_ROWS}: {fix}"
    if not is_binary(metric):
        return None, f"{rows} test rows; what they can show of {metric} depends on its spread, and the verdict says it"
    smallest = smallest_difference(rows, level)
    shown = f"{rows} test rows can show a difference of {100 * smallest:.1f} points"
    return smallest, f"{shown} (level {100 * level:g}%, power 80%)"
