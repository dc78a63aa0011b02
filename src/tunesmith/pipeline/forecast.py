"""`tunesmith plan`: everything that can be said before training, from the data and a dry run."""

from __future__ import annotations

from ..evaluate.stats import smallest_difference
from ..methods.sft import CrossEntropy
from ..model.load import load
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
    screen.stage(
        "Machine", f"{facts['device']}, {facts['threads']} threads, {float(str(facts['memory_bytes'])) / 1e9:.0f} GB"
    )
    for update in recipe.update:
        model = load(recipe.base, world)
        if update == recipe.update[0]:
            screen.stage("Data", recipe.data.train)
            data = prepare(recipe, model.vocabulary, screen)
        screen.stage("Training", update)
        settings = derive(recipe, update, model, data.train)
        attach(recipe, update, model, settings)
        source = steps_of(recipe, settings, data.train, model, world)
        sizes = [len(example.tokens) for example in data.train]
        cost = predict(model, source, CrossEntropy(), update, sizes, settings.batch)
        screen.derived(settings.derived)
        screen.line(
            f"{source.steps} steps: about {cost.seconds:.0f} s, {cost.peak_memory_bytes / 1e9:.1f} GB at the peak, {cost.flops:.2g} FLOPs"
        )
    rows = len(data.test_items)
    screen.stage("Evidence")
    screen.line(
        f"{rows} test rows can show a difference of {100 * smallest_difference(rows, recipe.evaluate.level):.1f} points (power 80 %)"
    )
