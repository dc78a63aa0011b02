"""A reward model from people's choices, and a second one from the other half of them, which judges what the first
was used for. Each is held against "the longer answer wins" and against its own untrained head."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..data.split import observations, unit_of
from ..errors import ModelError
from ..evaluate.measure import scored
from ..evaluate.preferences import (
    agreement,
    calibration,
    longer_wins,
    right,
    scores_of,
    verdict_on_reward,
    within_lengths,
)
from ..evaluate.stats import contrast, one_each, win_rate
from ..folder import RunFolder, is_run_folder, read_json, write_json, write_jsonl
from ..methods.annotate import Group
from ..methods.order import EpochSteps
from ..methods.reward import BradleyTerry, read_there, rewards
from ..model.load import Model, load
from ..model.values import attach_value_head, load_value_head, normalise, save_value_head
from ..recipe import Recipe, load_recipe
from ..screen import Screen
from ..train.meter import machine, release_memory, reset_peak_memory
from ..train.plan import Reach, Settings, derive
from ..types import Comparison
from ..world import World
from .begin import Place, checked, load_base, one_update, opened
from .handed import Made, hand_over, open_made
from .loop import Undertaking, carry_out
from .pairs import Pairs, halves, margin, pair, prepare_pairs, scored_pairs
from .tune import account, attach, optimization, planned

REWARD, JUDGE = "reward", "judge"
JUDGED_AT_ONCE = 64  # pairs, between two lines of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A reward model on the test pairs: scores [pairs 2] before and after training, and what training took.

    `deviation` is what its own scores were divided by: differences times it are what it takes for log-odds.
    """

    scores: np.ndarray
    untrained: np.ndarray
    deviation: float
    train: Mapping[str, Any]
    pairs: int


def learn_reward(place: Place) -> None:
    """Train one or two reward models and write results.json."""
    recipe, world, folder = place.recipe, place.world, place.folder
    checked(recipe, place.root, place.screen)
    one_update(recipe)
    base = load_base(recipe, world, place.screen)
    place.screen.stage("Data", recipe.data.train)
    pairs = _few_to_judge(prepare_pairs(recipe, base.vocabulary, place.screen), recipe.evaluate.rows)
    groups = scored_pairs(pairs.rows["train"], pairs.groups["train"], recipe.preference)
    shares = dict(zip((REWARD, JUDGE), halves(pairs.rows["train"], recipe.data.seed), strict=True))
    if not recipe.preference.halves:
        shares = {REWARD: list(range(len(groups)))}
    facts = {"base_notes": base.notes}
    del base
    with opened(place, pairs.ledger, facts):
        judged = {}
        for number, (name, share) in enumerate(shares.items()):
            place.screen.stage("Training", f"{name} model on {len(share)} of {len(groups)} pairs")
            judged[name] = _learned(place, name, [groups[i] for i in share], pairs, recipe.train.seed + number)
        if world.leads:
            place.screen.stage("Verdict")
            _write_answers(folder, pairs, judged)
            write_json(folder.results, _results(place, pairs, judged))
        world.barrier()


def load_reward(name: str, which: str, world: World) -> Model:
    """The model that a finished reward run made, with its head. Raises ModelError for anything else."""
    path = Path(name)
    fix = "Name the folder of a finished run with method: reward."
    if not is_run_folder(path) or not (path / "results.json").is_file():
        raise ModelError("not a finished run", where=f"reward: {name}", fix=fix)
    recipe = load_recipe(path / "recipe.yaml")
    if recipe.method != "reward":
        raise ModelError(f"a run with method {recipe.method}, which gives no scores", where=f"reward: {name}", fix=fix)
    made = path / which
    if not made.is_dir():
        fix = "Run it with preference.halves: true, or name another run as reward.judge."
        raise ModelError(f"the run has no {which} model", where=f"reward: {name}", fix=fix)
    model = open_made(Made(run=RunFolder(path=path), recipe=recipe, update=recipe.update[0], path=made), world)
    load_value_head(model, made)
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    return model


def agreement_with(
    rows: Sequence[Comparison], folder: RunFolder, recipe: Recipe, world: World, screen: Screen
) -> dict[str, Any]:
    """`pair_accuracy` of a finished run's models on other choices, beside "the longer answer wins"."""
    names = (REWARD, JUDGE) if recipe.preference.halves else (REWARD,)
    accuracies: dict[str, np.ndarray] = {}
    with screen.progress("judging", len(names) * len(rows)) as tick:
        for number, name in enumerate(names):
            model = load_reward(str(folder.path), name, world)
            pairs = [pair(row, model.vocabulary) for row in rows]
            parts = []
            for at in range(0, len(rows), JUDGED_AT_ONCE):
                parts.append(pair_rewards(model, pairs[at : at + JUDGED_AT_ONCE]))
                tick(number * len(rows) + min(at + JUDGED_AT_ONCE, len(rows)))
            accuracies[name] = right(np.concatenate(parts))
            accuracies["length"] = longer_wins(_answer_tokens(pairs))
    level, seed = recipe.evaluate.level, recipe.evaluate.seed
    groups = observations(rows, unit_of(rows, recipe.data))
    accuracies = {name: one_each(values, groups) for name, values in accuracies.items()}
    ids = tuple(dict.fromkeys(groups))
    one, other = (scored(name, ids, {"pair_accuracy": accuracies[name]}) for name in (REWARD, "length"))
    return {
        "pair_accuracy": {name: asdict(win_rate(values, level, seed)) for name, values in accuracies.items()},
        "contrasts": [asdict(contrast(one, other, "pair_accuracy", level, seed))],
    }


def _few_to_judge(pairs: Pairs, most: int | None) -> Pairs:
    """At most so many test pairs; all of them for None."""
    rows, groups = dict(pairs.rows), dict(pairs.groups)
    rows["test"], groups["test"] = rows["test"][:most], groups["test"][:most]
    return replace(pairs, rows=rows, groups=groups)


def _learned(place: Place, name: str, groups: Sequence[Group], pairs: Pairs, seed: int) -> Judged:
    """Train one model, or read what an earlier process found of it."""
    recipe, folder, world, screen = place.recipe, place.folder, place.world, place.screen
    record = folder.path / "trained" / f"{name}.json"
    if record.is_file():
        screen.line(f"the {name} model was trained before")
        known = read_json(record)
        return Judged(
            scores=np.array(known["scores"]),
            untrained=np.array(known["untrained"]),
            deviation=known["deviation"],
            train=known["train"],
            pairs=known["pairs"],
        )
    model = load(recipe.base, world, recipe.weights)
    settings = derive(recipe, recipe.update[0], model, [e for group in groups for e in group], rows=len(groups))
    shape = attach(recipe, model, settings)
    head = attach_value_head(model, seed=seed)
    untrained = pair_rewards(model, pairs.groups["test"] if name == REWARD else [])
    train = _fitted(place, name, model, settings, groups, pairs, seed)
    reference = pair_rewards(model, pairs.groups["valid"][: recipe.evaluate.valid_rows])
    deviation = float(reference.std()) or 1.0
    normalise(model, float(reference.mean()), deviation)
    scores = pair_rewards(model, pairs.groups["test"])
    found = Judged(scores=scores, untrained=untrained, deviation=deviation, train=train, pairs=len(groups))
    if world.leads:
        hand_over(model, shape, folder.path / name, lambda made: save_value_head(head, made))
        write_json(record, asdict(found))
    world.barrier()
    return found


def _fitted(
    place: Place, name: str, model: Model, settings: Settings, groups: Sequence[Group], pairs: Pairs, seed: int
) -> dict[str, Any]:
    """Train to the best validation loss; what it took."""
    recipe, world = place.recipe, place.world
    source = EpochSteps(
        groups,
        batch=settings.batch,
        epochs=settings.epochs,
        budget_tokens=settings.microbatch_tokens,
        world=world,
        seed=seed,
        max_steps=recipe.train.max_steps,
        packs=model.packs,
        finish=read_there,
    )
    reach = Reach(scored=0.0)  # the scalar head stands where that of the vocabulary would
    plan = planned(place, name, model, settings, source, BradleyTerry(), reach)
    valid = pairs.groups["valid"][: recipe.evaluate.valid_rows]
    margins = np.array([margin(row, recipe.preference) for row in pairs.rows["valid"][: len(valid)]])
    reset_peak_memory()
    work = Undertaking(
        name=name,
        model=model,
        source=source,
        loss=BradleyTerry(),
        how=optimization(recipe, settings),
        watch=lambda step: _look(model, valid, margins, world),
        decides="valid_loss",
        describe=lambda line: f"validation loss {line['valid_loss']:.4f}, accuracy {line['valid_metric']:.3f}",
        evaluations=recipe.train.evaluations,
        patience=recipe.train.patience,
    )
    return account(place, plan, model, source, carry_out(work, place.folder, world, place.screen))


def pair_rewards(model: Model, groups: Sequence[Group]) -> np.ndarray:
    """Rewards [pairs 2], the chosen answers' first."""
    return rewards(model, [example for group in groups for example in group]).reshape(-1, 2)


def _look(model: Model, valid: Sequence[Group], margins: np.ndarray, world: World) -> dict[str, float]:
    """Loss in nats a pair and accuracy on validation pairs; measured on the first rank, known to all."""
    loss = accuracy = 0.0
    release_memory()
    if world.leads:
        scores = pair_rewards(model, valid)
        loss = float(np.logaddexp(0, -(scores[:, 0] - scores[:, 1] - margins)).mean())
        accuracy = float(right(scores).mean())
    release_memory()
    loss, accuracy = world.sum([loss, accuracy])
    return {"valid_loss": loss, "valid_metric": accuracy}


def _results(place: Place, pairs: Pairs, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """The content of results.json."""
    recipe = place.recipe
    level, seed = recipe.evaluate.level, recipe.evaluate.seed
    tokens = _answer_tokens(pairs.groups["test"])
    scores = judged[REWARD].scores
    groups = observations(pairs.rows["test"], pairs.unit)
    each = {
        **{name: right(one.scores) for name, one in judged.items()},
        "length": longer_wins(tokens),
        "untrained": right(judged[REWARD].untrained),
    }
    by_arm = {name: one_each(values, groups) for name, values in each.items()}
    ids = tuple(dict.fromkeys(groups))
    measured = {name: scored(name, ids, {"pair_accuracy": values}) for name, values in by_arm.items()}
    others = [name for name in ("length", "untrained", JUDGE) if name in measured]
    contrasts = [contrast(measured[REWARD], measured[name], "pair_accuracy", level, seed) for name in others]
    accuracy = {name: win_rate(values, level, seed) for name, values in by_arm.items()}
    return {
        "schema": 1,
        "tunesmith": __version__,
        "method": "reward",
        "base": recipe.base,
        "task": {"metric": "pair_accuracy"},
        "verdict": asdict(verdict_on_reward(accuracy[REWARD], contrasts[0], len(scores))),
        "subject": REWARD,
        "models": {
            name: {
                "pair_accuracy": asdict(accuracy[name]),
                "pairs": one.pairs,
                "train": {key: value for key, value in one.train.items() if key != "predicted"},
            }
            for name, one in judged.items()
        },
        "baselines": {name: {"pair_accuracy": asdict(accuracy[name])} for name in ("length", "untrained")},
        "contrasts": [asdict(one) for one in contrasts],
        **(
            {"agreement": asdict(agreement(scores, judged[JUDGE].scores, groups, level, seed))}
            if JUDGE in judged
            else {}
        ),
        "calibration": calibration(scores * judged[REWARD].deviation, groups, level, seed),
        "by_length": within_lengths(scores, tokens, groups, level, seed),
        "scores": scores_of(scores),
        "plan": {
            name: {
                "predicted": one.train["predicted"],
                "measured": {key: one.train[key] for key in ("seconds", "peak_memory_bytes", "flops")},
            }
            for name, one in judged.items()
        },
        "test_reads": 1,
        **pairs.counts,
        "machine": machine(place.world.device),
        "seconds": time.monotonic() - place.started,
    }


def _answer_tokens(pairs: Sequence[Group]) -> np.ndarray:
    """Lengths [pairs 2] of the answers."""
    return np.array([[int((example.weights > 0).sum()) for example in group] for group in pairs])


def _write_answers(folder: RunFolder, pairs: Pairs, judged: Mapping[str, Judged]) -> None:
    for name, one in judged.items():
        lines = [
            {
                "id": row.id,
                "prompt": [{"role": message.role, "content": message.content} for message in row.prompt],
                "chosen": row.chosen.content,
                "rejected": row.rejected.content,
                "scores": {"chosen": float(chosen), "rejected": float(rejected)},
            }
            for row, (chosen, rejected) in zip(pairs.rows["test"], one.scores, strict=True)
        ]
        write_jsonl(folder.answers(name), lines)
