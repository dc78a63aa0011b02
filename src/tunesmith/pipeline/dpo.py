"""A policy that learns from choices without a reward model (dpo). Reward models, where named, only judge it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from ..data.counts import counts
from ..data.curate import SPLITS
from ..data.pack import pack_groups
from ..methods.annotate import Group, annotate
from ..methods.dpo import PreferenceLoss
from ..methods.order import EpochSteps
from ..model.load import Model, Vocabulary
from ..model.score import score
from ..train.meter import release_memory
from ..train.plan import Reach, Settings, derive
from .aligned import Aligning, align, reference_of
from .begin import Place, checked, load_base, one_update
from .pairs import Pairs, prepare_pairs
from .panel import open_panel
from .prepare import answer_room
from .prompts import Prompts, asked_once, longest_prompt, question
from .tune import attach, optimization, planned

REFERENCE = "reference"


def learn_from_choices(place: Place) -> None:
    """Train a policy on pairs and write results.json."""
    recipe, world, screen = place.recipe, place.world, place.screen
    checked(recipe, place.root, place.screen)
    one_update(recipe)
    base = load_base(recipe, world, screen)
    screen.stage("Data", recipe.data.train)
    pairs = prepare_pairs(recipe, base.vocabulary, screen)
    prompts = _asked(pairs, place, base.vocabulary)
    with ExitStack() as stack:
        panel = open_panel(recipe, place.root, base, world, stack, screen)
        align(place, base, prompts, panel, lambda model: _begin(place, model, pairs))


def _begin(place: Place, model: Model, pairs: Pairs) -> Aligning:
    recipe, update, world = place.recipe, place.recipe.update[0], place.world
    spec = recipe.preference
    examples = [example for group in pairs.groups["train"] for example in group]
    settings = derive(recipe, update, model, examples, rows=len(pairs.groups["train"]))
    budget = settings.microbatch_tokens
    shape = attach(recipe, model, settings)
    reference = reference_of(model, update, recipe.base, world)
    with reference() as before:
        place.screen.line("what the base model says of every pair is computed once")
        train = annotate(before, pairs.groups["train"], {"log_probs": REFERENCE}, budget_tokens=budget)
        valid = annotate(
            before, pairs.groups["valid"][: recipe.evaluate.valid_rows], {"log_probs": REFERENCE}, budget_tokens=budget
        )
    source = EpochSteps(
        train,
        batch=settings.batch,
        epochs=settings.epochs,
        budget_tokens=budget,
        world=world,
        seed=recipe.train.seed,
        max_steps=recipe.train.max_steps,
        packs=model.packs,
    )
    found = counts(examples)
    reach = Reach(
        scored=float(found.scored.sum() / found.tokens.sum()),
        forwards=len(train) / (source.steps * source.rows_a_step),  # the reference reads every pair once
    )
    loss = PreferenceLoss(beta=spec.beta, kind=spec.loss, smoothing=spec.smoothing)
    return Aligning(
        model=model,
        shape=shape,
        source=source,
        loss=loss,
        how=optimization(recipe, settings),
        reference=reference,
        plan=planned(place, update, model, settings, source, loss, reach),
        watch=lambda: _look(model, loss, valid, settings),
    )


@torch.no_grad()
def _look(model: Model, loss: PreferenceLoss, valid: Sequence[Group], settings: Settings) -> dict[str, float]:
    """Loss in nats a pair and share of right ones on validation pairs."""
    release_memory()
    budget = settings.microbatch_tokens if model.packs else 1
    total = right = pairs = 0.0
    for batch in pack_groups(valid, budget_tokens=budget, share=model.packs):
        there = batch.to(model.device)
        terms = loss(score(model, there, loss.needs), there)
        total, right, pairs = total + float(terms.sum), right + terms.report["accuracy"], pairs + loss.count(batch)
    release_memory()
    return {"valid_loss": total / pairs, "valid_metric": right / pairs}


def _asked(pairs: Pairs, place: Place, vocabulary: Vocabulary) -> Prompts:
    """The pairs' prompts, to be answered before and after."""
    recipe = place.recipe
    every = {name: tuple(map(question, pairs.rows[name])) for name in SPLITS}
    found = asked_once(every, pairs.unit, recipe, place.screen)
    answers = [int((e.weights > 0).sum()) for group in pairs.groups["train"] for e in group]
    room = recipe.task.max_new_tokens or answer_room(max(answers))
    asked = [longest_prompt(found[name], pairs.rows[name], room, vocabulary) for name in ("valid", "test")]
    return Prompts(
        items=found,
        examples=(),
        max_new_tokens=room,
        longest_tokens=max(asked) + room,
        census=pairs.census,
        ledger=pairs.ledger,
        unit=pairs.unit,
    )
