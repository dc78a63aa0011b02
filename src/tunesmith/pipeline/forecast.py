"""`tunesmith plan`: everything that can be said before training, from the data and a dry run."""

from __future__ import annotations

from ..evaluate.metrics import is_binary
from ..evaluate.stats import smallest_difference
from ..methods.sft import CrossEntropy
from ..model.load import load, load_vocabulary
from ..recipe import Recipe
from ..screen import Screen
from ..train.meter import machine
from ..train.plan import derive, predict
from ..world import World
from .prepare import prepare
from .tune import attach, steps_of


def forecast(recipe: Recipe, world: World, screen: Screen) -> None:
    """Print derived values with reasons, predicted cost of each update, and what the test rows can show."""
    facts = machine(world.device)
    memory = f"{float(str(facts['memory_bytes'])) / 1e9:.0f} GB"
    screen.stage("Machine", f"{facts['device']}, {facts['threads']} threads, {memory}")
    screen.stage("Data", recipe.data.train)
    data = prepare(recipe, load_vocabulary(recipe.base), screen)
    for update in recipe.update:
        screen.stage("Training", update)
        model = load(recipe.base, world)
        settings = derive(recipe, update, model, data.train)
        attach(recipe, update, model, settings)
        source = steps_of(recipe, settings, data.train, model, world)
        sizes = [len(example.tokens) for example in data.train]
        cost = predict(model, source, CrossEntropy(), update, sizes, settings.batch)
        screen.derived(settings.derived)
        memory = f"{cost.peak_memory_bytes / 1e9:.1f} GB at the peak"
        screen.line(f"{source.steps} steps: about {cost.seconds:.0f} s, {memory}, {cost.flops:.2g} FLOPs")
    screen.stage("Evidence")
    screen.line(what_rows_show(recipe, len(data.test_items))[1])


def what_rows_show(recipe: Recipe, rows: int) -> tuple[float | None, str]:
    """The smallest difference of the deciding metric that so many test rows can show, and a sentence about it.

    Known beforehand for 0/1 scores only; what others show depends on their spread.
    """
    metric, level = recipe.task.metric, recipe.evaluate.level
    if not is_binary(metric):
        return None, f"{rows} test rows; what they can show of {metric} depends on its spread, and the verdict says it"
    smallest = smallest_difference(rows, level)
    shown = f"{rows} test rows can show a difference of {100 * smallest:.1f} points"
    return smallest, f"{shown} (level {level:.0%}, power 80 %)"
