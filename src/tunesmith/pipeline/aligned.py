"""What all methods that align a policy share: looks at held-out prompts, win rates, hand-over and results.json."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .. import __version__
from ..data.read import read_choices
from ..evaluate.forgetting import forgotten, remember
from ..evaluate.preferences import verdict_on_policy
from ..evaluate.stats import contrast, estimate, win_rate
from ..folder import read_json, read_jsonl, write_json, write_jsonl
from ..model.adapters import load_adapter
from ..model.load import Model, load
from ..model.lora import LoraShape, adapters_off
from ..recipe import Recipe, Update
from ..tensors import Loss, StepSource
from ..train.meter import machine, reset_peak_memory
from ..train.optim import Optimization
from ..types import UNENDED, UNSCORED, Estimate, Verdict
from ..world import World
from .begin import Place, opened
from .handed import hand_over
from .loop import BEYOND, Undertaking, carry_out
from .panel import FUNCTION, Panel, Reference, Seen, at_temperature, look, wins
from .prompts import Prompts
from .results import lost_ability
from .tune import Plan, account

_ROLLOUT = ("rollout", "score", "score_sd", "kl", "kl_coefficient", "length_tokens", "repetition", "entropy")
_ROLLOUT += ("unended", "unscored", "alike")
BY = {"judge_score": "judge", "reward_score": "reward model", "reward": "reward"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligning:
    """A policy about to be trained. `watch`, where given, looks at validation rows besides the panel's look.

    Looks more than `farthest` nats from the reference are not handed over while others are nearer.
    """

    model: Model
    shape: LoraShape | None
    plan: Plan
    source: StepSource
    loss: Loss
    how: Optimization
    reference: Reference
    beside: Callable[[], Mapping[str, float]] = dict
    enough: Callable[[], str] = str
    watch: Callable[[], dict[str, float]] = dict
    farthest: float = math.inf


def align(place: Place, base: Model, prompts: Prompts, panel: Panel, begin: Callable[[Model], Aligning]) -> None:
    """Judge the base, train the policy that `begin` makes of it, judge that, and write results.json."""
    recipe, folder, world, screen = place.recipe, place.folder, place.world, place.screen
    update = recipe.update[0]
    how = at_temperature(recipe, prompts.max_new_tokens)
    facts = {"max_new_tokens": prompts.max_new_tokens, "base_notes": base.notes}
    retention = read_choices(recipe.evaluate.retention) if recipe.evaluate.retention else []
    with opened(place, prompts.ledger, facts):
        screen.stage("Before", "the base model's answers, as the panel scores them")
        before, on_valid = (look(base, itself(base), panel, prompts.items[name], how) for name in ("test", "valid"))
        remembered = remember(base, retention) if recipe.evaluate.forgetting else None
        screen.line(_told(before, panel))
        if warning := _failing_pays(before, panel):
            screen.warn(warning)
        screen.stage("Training", f"{recipe.method}, {update}")
        model, train, curve = _trained(place, base, prompts, panel, begin, on_valid)
        screen.stage("After", "the same prompts, the same random numbers")
        reference = reference_of(model, update, recipe.base, world)
        after = look(model, reference, panel, prompts.items["test"], how)
        screen.line(_told(after, panel))
        lost = lost_ability(recipe, forgotten(remembered, model)) if remembered else None
        if world.leads:
            for arm, seen in (("base", before), (update, after)):
                write_jsonl(folder.answers(arm), _lines(seen))
            screen.stage("Verdict")
            write_json(folder.results, _results(place, prompts, panel, before, after, train, curve, lost))
        world.barrier()


def compared(recipe: Recipe, panel: Panel, before: Seen, after: Seen, update: Update) -> dict[str, Any]:
    """Both models' answers beside each other, as in results.json; with a win rate where somebody judges."""
    level, seed = recipe.evaluate.level, recipe.evaluate.seed
    measured = {"base": before.measurement("base"), update: after.measurement(update)}
    arms = {}
    for name, one in measured.items():
        arms[name] = {
            "metrics": {metric: asdict(estimate(scores, level, seed)) for metric, scores in one.scores.items()},
            "prompt_tokens_per_request": float(one.prompt_tokens.mean()),
            "completion_tokens_per_request": float(one.completion_tokens.mean()),
            "seconds": one.seconds,
        }
    found: dict[str, Any] = {"arms": arms}
    if panel.decides:
        found["win_rate"] = asdict(win_rate(wins(after, before, panel.decides), level))
        found["win_rate_by"] = BY[panel.decides]
    found["kl"] = asdict(estimate(after.kl, level, seed))
    pairs = [contrast(measured[update], measured["base"], name, level, seed) for name in before.scores]
    return {**found, "contrasts": [asdict(one) for one in pairs]}


def reference_of(model: Model, update: Update, base: str, world: World) -> Reference:
    """The model before training, for as long as `model` is trained: adapters switched off, or a second copy."""
    if update == "lora":

        @contextmanager
        def switched_off() -> Iterator[Model]:
            with adapters_off(model.hf):
                yield model

        return switched_off
    return itself(load(base, world))


def itself(model: Model) -> Reference:
    """The model as its own reference."""

    @contextmanager
    def given() -> Iterator[Model]:
        yield model

    return given


def _trained(
    place: Place, base: Model, prompts: Prompts, panel: Panel, begin: Callable[[Model], Aligning], on_valid: Seen
) -> tuple[Model, dict[str, Any], list[dict[str, Any]]]:
    """The tuned model, what training took, and the looks at validation prompts, the first at step 0."""
    recipe, folder, world = place.recipe, place.folder, place.world
    update = recipe.update[0]
    target = folder.handed_over(update)
    record = folder.path / "trained" / f"{update}.json"
    if record.is_file():
        place.screen.line(f"{update} was trained before; loading {target.name}/")
        known = read_json(record)
        model = base if update == "lora" else load(str(target), world)
        if update == "lora":
            load_adapter(model, target)
        return model, known["train"], known["curve"]
    work = begin(base)
    reset_peak_memory()
    how = at_temperature(recipe, prompts.max_new_tokens)

    def watch(step: int) -> dict[str, float]:
        found = work.watch()
        seen = look(work.model, work.reference, panel, prompts.items["valid"], how)
        line = {**_point(seen, on_valid, panel), **found}
        line[BEYOND] = max(line["kl"] - work.farthest, 0.0)
        return {**line, "cost": -line[panel.decides] if panel.decides else found["valid_loss"]}

    undertaking = Undertaking(
        name=update,
        model=work.model,
        source=work.source,
        loss=work.loss,
        how=work.how,
        watch=watch,
        decides="cost",
        describe=_described,
        evaluations=recipe.train.evaluations,
        patience=recipe.train.patience,
        beside=work.beside,
        enough=work.enough,
    )
    outcome = carry_out(undertaking, folder, world, place.screen)
    train = account(place, work.plan, work.model, work.source, outcome)
    curve = [{"step": 0, **_point(on_valid, on_valid, panel)}, *map(dict, outcome.history)]
    curve = [{**point, "chosen": point["step"] == outcome.best["step"]} for point in curve]
    if world.leads:
        hand_over(work.model, work.shape, target)
        write_json(record, {"train": train, "curve": curve})
    world.barrier()
    return work.model, train, curve


def _point(seen: Seen, base: Seen, panel: Panel) -> dict[str, float]:
    """A look as a point of the curve."""
    names = [name for name in seen.scores if name not in panel.grades]
    point = {name: float(seen.scores[name].mean()) for name in names}
    point["kl"] = float(seen.kl.mean())
    return {**point, "win_rate": float(wins(seen, base, panel.decides).mean())} if panel.decides else point


def _described(line: Mapping[str, float]) -> str:
    wanted = ("judge_score", "reward_score", "reward", "win_rate", "kl", "length_tokens", "valid_loss", "valid_metric")
    told = ", ".join(f"{name.replace('_', ' ')} {line[name]:.3f}" for name in wanted if name in line)
    return told + (", beyond policy.kl_limit" if line[BEYOND] else "")


def _beyond(curve: Sequence[Mapping[str, float]], limit: float) -> str:
    """What became of looks that lay too far from the reference, if any did."""
    looks = curve[1:]
    far = [look for look in looks if look.get(BEYOND)]
    if not far:
        return ""
    what = f"{len(far)} of {len(looks)} looks at validation prompts lay beyond policy.kl_limit ({limit:g} nats)"
    if len(far) < len(looks):
        return f"{what} and could not be chosen, whatever they scored."
    return f"{what}: the nearest was taken. Look more often (train.evaluations) or learn more slowly."


def _told(seen: Seen, panel: Panel) -> str:
    names = [*panel.rewards, *panel.grades, "length_tokens", "unended", UNSCORED]
    told = [name for name in names if name in seen.scores]
    return ", ".join(f"{name.replace('_', ' ')} {seen.scores[name].mean():.3f}" for name in told)


def _failing_pays(seen: Seen, panel: Panel) -> str:
    """What to tell the user where an answer that the function fails on counts more than one that it scores."""
    failed = seen.scores.get(UNSCORED, np.zeros(1)) > 0
    if not failed.any() or failed.all():
        return ""
    mean = seen.scores[FUNCTION][~failed].mean()
    what = f"an answer without a score counts {panel.missing_end:g}, one with a score {mean:.3g} on average"
    return f"{what}: set reward.missing_end below your scores" if mean < panel.missing_end else ""


def _lines(seen: Seen) -> list[dict[str, Any]]:
    return [
        {
            "id": answer.item.id,
            "prompt": [{"role": message.role, "content": message.content} for message in answer.item.prompt],
            "reference": answer.item.reference,
            "answer": answer.completion.text.strip(),
            "scores": {name: float(values[place]) for name, values in seen.scores.items()},
        }
        for place, answer in enumerate(seen.answers)
    ]


def _results(
    place: Place,
    prompts: Prompts,
    panel: Panel,
    before: Seen,
    after: Seen,
    train: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    lost: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of results.json."""
    recipe, update = place.recipe, place.recipe.update[0]
    found = compared(recipe, panel, before, after, update)
    found["arms"][update]["train"] = {key: value for key, value in train.items() if key != "predicted"}
    verdict = Verdict(decision="not shown", reasons=("Nothing judged the answers: set reward: to a reward run.",))
    if "win_rate" in found:
        won, kl = Estimate(**found["win_rate"]), Estimate(**found["kl"])
        rise = Estimate(**lost["general_loss"]["change"]) if lost else None
        limit = recipe.evaluate.forgetting_limit
        ties = float((wins(after, before, panel.decides) == 0.5).mean())
        cut = {arm: one["metrics"][UNENDED]["value"] for arm, one in found["arms"].items()}
        verdict = verdict_on_policy(won, found["win_rate_by"], prompts.asked, kl, rise, limit, ties=ties, cut=cut)
    if beyond := _beyond(curve, recipe.policy.kl_limit):
        verdict = replace(verdict, reasons=(*verdict.reasons, beyond))
    lines = [line for line in read_jsonl(place.folder.metrics) if line["arm"] == update and "rollout" in line]
    rollouts = {line["rollout"]: {key: line[key] for key in _ROLLOUT if key in line} for line in lines}
    keys = ("seconds", "peak_memory_bytes", "flops")
    return {
        "schema": 1,
        "tunesmith": __version__,
        "method": recipe.method,
        "base": recipe.base,
        "verdict": asdict(verdict),
        "subject": update,
        "task": {"metric": panel.decides or "length_tokens"},
        **found,
        "asked": prompts.asked,
        "curve": list(curve),
        **({"rollouts": list(rollouts.values())} if rollouts else {}),
        "forgetting": {update: lost} if lost else {},
        "plan": {update: {"predicted": train["predicted"], "measured": {key: train[key] for key in keys}}},
        "test_reads": 1,
        **prompts.counts,
        "machine": machine(place.world.device),
        "seconds": time.monotonic() - place.started,
    }
