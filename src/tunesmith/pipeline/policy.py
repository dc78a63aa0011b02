"""A policy that learns from rewards (ppo, grpo): answers are drawn, scored and learned from, rollout after rollout."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np

from ..errors import RecipeError
from ..folder import read_json, write_json
from ..methods.annotate import Group, annotate
from ..methods.grpo import GrpoLoss, grpo_examples
from ..methods.ppo import PpoLoss, adapted, imitated, ppo_examples
from ..methods.rollout import RolloutPlan, RolloutSteps, Shape
from ..model.load import Model
from ..model.values import attach_value_head, value_head
from ..recipe import Recipe
from ..tensors import Batch, Loss
from ..train.optim import Optimization
from ..train.plan import Prediction, Reach, Settings, derive_policy, predict
from ..types import Example
from .aligned import Aligning, align, reference_of
from .begin import Place, checked, load_base, one_update
from .panel import Panel, Reference, at_temperature, open_panel
from .prompts import Prompts, prepare_prompts
from .reward import REWARD, load_reward
from .tune import Plan, attach, optimization

ADAM_EPSILON = 1e-5  # gentler early steps (Huang et al. 2024, arXiv 2403.17031)
PROMPTS = {"ppo": 64, "grpo": 16}
PENALTY = {"ppo": 0.05, "grpo": 0.0}


def learn_from_rewards(place: Place) -> None:
    """Train a policy against a reward and write results.json."""
    recipe, world, screen = place.recipe, place.world, place.screen
    checked(recipe, place.root, place.screen)
    one_update(recipe)
    if world.size > 1:
        raise RecipeError(
            f"method {recipe.method} runs in one process", where="method", fix="Start it without torchrun."
        )
    base = load_base(recipe, world, screen)
    screen.stage("Data", recipe.data.train)
    prompts = prepare_prompts(recipe, base.vocabulary, screen)
    if recipe.method == "ppo" and recipe.policy.mix and not prompts.examples:
        fix = "Give rows with answers, or leave policy.mix out."
        raise RecipeError("data.train has prompts alone, without answers to imitate", where="policy.mix", fix=fix)
    if recipe.method == "ppo" and recipe.policy.kl_target and not penalty(recipe):
        fix = "Leave policy.kl out, or give it a price to begin with."
        raise RecipeError("a price of 0 stays 0, however it is adapted", where="policy.kl_target", fix=fix)
    with ExitStack() as stack:
        panel = open_panel(recipe, place.root, base, world, stack, screen)
        align(place, base, prompts, panel, lambda model: _begin(place, model, prompts, panel))


def _begin(place: Place, model: Model, prompts: Prompts, panel: Panel) -> Aligning:
    """Adapters, value head, rollouts and loss of a policy that is still the base model."""
    recipe, update = place.recipe, place.recipe.update[0]
    ppo = recipe.method == "ppo"
    group = 1 if ppo else recipe.policy.group
    asked = recipe.policy.prompts or PROMPTS[recipe.method]
    settings = derive_policy(recipe, update, model, asked * group, prompts.longest_tokens)
    shape = attach(recipe, model, settings)
    reference = reference_of(model, update, recipe.base, place.world)
    if ppo:
        _attach_values(place, model)
    plan = RolloutPlan(
        rollouts=recipe.policy.rollouts,
        prompts=asked,
        group=group,
        epochs=int(settings.epochs),
        batch=settings.batch,
        budget_tokens=settings.microbatch_tokens,
        missing_end=panel.missing_end,
        seed=recipe.train.seed,
    )
    shaped = (
        _ppo(model, reference, recipe, plan, prompts.examples, settings.microbatch_tokens)
        if ppo
        else _grpo(reference, recipe, settings.microbatch_tokens)
    )
    # At another temperature the ratios would not be of what was drawn.
    drawn = replace(at_temperature(recipe, prompts.max_new_tokens), temperature=1.0)
    source = RolloutSteps(
        model,
        prompts.items["train"],
        drawn,
        plan,
        panel.trained_on,
        shaped,
        place.folder.path / "rollouts" / update,
    )
    loss: Loss = PpoLoss() if ppo else GrpoLoss(kl=penalty(recipe))
    return Aligning(
        model=model,
        shape=shape,
        plan=_planned(place, model, source, loss, settings, Reach(forwards=_forwards(recipe) / source.plan.epochs)),
        source=source,
        loss=loss,
        how=_optimization(recipe, settings),
        reference=reference,
        beside=lambda: source.statistics,
        enough=lambda: _too_far(source.statistics, recipe),
        farthest=recipe.policy.kl_limit,
    )


def penalty(recipe: Recipe) -> float:
    """What a nat away from the base costs."""
    return PENALTY[recipe.method] if recipe.policy.kl is None else recipe.policy.kl


def _optimization(recipe: Recipe, settings: Settings) -> Optimization:
    return replace(optimization(recipe, settings), epsilon=ADAM_EPSILON)


def _attach_values(place: Place, model: Model) -> None:
    """The value head: zero, or what the reward model's head says."""
    recipe = place.recipe
    head = attach_value_head(model)
    if recipe.policy.value_start == "reward":
        if recipe.reward.by_function:
            fix = "Use policy.value_start: zero with a reward that is a function."
            raise RecipeError("there is no reward model to start from", where="policy.value_start", fix=fix)
        scorer = load_reward(recipe.reward.by, REWARD, place.world)
        head.load_state_dict(value_head(scorer.hf).state_dict())


def _ppo(
    model: Model, reference: Reference, recipe: Recipe, plan: RolloutPlan, examples: Sequence[Example], budget: int
) -> Shape:
    policy = recipe.policy

    def shape(
        groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]
    ) -> tuple[list[Group], Mapping[str, float]]:
        here = annotate(model, groups, {"log_probs": "old_log_probs", "values": "old_values"}, budget_tokens=budget)
        here, far = _from_reference(here, reference, budget)
        price = before.get("kl_coefficient", penalty(recipe))
        if policy.kl_target and before:
            price = adapted(price, before["kl"], policy.kl_target, plan.prompts)
        ready = ppo_examples(here, scores, price)
        if policy.mix:
            sampled = sum(int(e.weights.sum()) for group in ready for e in group)
            first = int(before.get("rollout", -1.0) + 1) * plan.prompts
            beside = [examples[(first + n) % len(examples)] for n in range(plan.prompts)]
            share = policy.mix * sampled / sum(float(e.weights.sum()) for e in beside)
            ready += imitated(beside, share)
        return ready, {"kl": far, "kl_coefficient": price}

    return shape


def _grpo(reference: Reference, recipe: Recipe, budget: int) -> Shape:
    def shape(
        groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]
    ) -> tuple[list[Group], Mapping[str, float]]:
        here, far = _from_reference(groups, reference, budget)
        ready, alike = grpo_examples(here, scores, recipe.policy.advantage)
        return ready, {"kl": far, "alike": float(alike)}

    return shape


def _from_reference(groups: Sequence[Group], reference: Reference, budget: int) -> tuple[list[Group], float]:
    """The groups with the reference's log-probabilities, and how many nats an answer is away from it on average."""
    with reference() as before:
        found = annotate(before, groups, {"log_probs": "reference"}, budget_tokens=budget)
    answers = [example for group in found for example in group]
    far = [float((e.extra["old_log_probs"] - e.extra["reference"])[e.weights > 0].sum()) for e in answers]
    return found, float(np.mean(far))


def _too_far(statistics: Mapping[str, float], recipe: Recipe) -> str:
    if statistics.get("kl", 0.0) <= recipe.policy.kl_limit:
        return ""
    return (
        f"answers are {statistics['kl']:.1f} nats from the base's, more than policy.kl_limit {recipe.policy.kl_limit:g}"
    )


class _FirstRollout:
    """The steps of the first rollout alone, to be timed."""

    def __init__(self, source: RolloutSteps) -> None:
        self.source, self.steps = source, source.plan.epochs * source.plan.parts

    def __call__(self, step: int) -> list[Batch]:
        return self.source(step)

    @property
    def rows_a_step(self) -> float:
        return self.source.rows_a_step

    def row_tokens(self) -> list[float]:
        return self.source.row_tokens()


def _forwards(recipe: Recipe) -> int:
    """How often an answer goes through a model before it is learned from."""
    drawn, reference, values, reward = 1, 1, recipe.method == "ppo", not recipe.reward.by_function
    return drawn + reference + values + reward


def _planned(place: Place, model: Model, source: RolloutSteps, loss: Loss, settings: Settings, reach: Reach) -> Plan:
    """What all rollouts should take, from the first, which is kept and trained on."""
    update, plan = settings.update, read_json(place.folder.plan)
    if update not in plan["arms"]:
        begun = time.monotonic()
        source(0)
        drawing = time.monotonic() - begun
        one = predict(model, _FirstRollout(source), loss, settings, reach)
        rollouts = source.plan.rollouts
        whole = replace(one, seconds=rollouts * (drawing + one.seconds), flops=rollouts * one.flops)
        plan["arms"][update] = {"steps": source.steps, "predicted": asdict(whole)}
        plan["derived"] += [asdict(line) for line in settings.derived]
        write_json(place.folder.plan, plan)
    found = Prediction(**plan["arms"][update]["predicted"])
    place.screen.derived(settings.derived)
    answers = source.plan.prompts * source.plan.group
    place.screen.line(
        f"plan: {source.plan.rollouts} rollouts of {answers} answers, {source.steps} steps, "
        f"about {found.seconds:.0f} s, {found.peak_memory_bytes / 1e9:.1f} GB at the peak{found.source}"
    )
    return Plan(name=update, settings=settings, reach=reach, predicted=found)
