"""Train one update (LoRA, full or economy): plan, loop, validation, best weights, hand-over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..evaluate.measure import example_losses, measure
from ..evaluate.systems import Prompting
from ..folder import read_json, read_jsonl, write_json, write_jsonl
from ..methods.economy import KeptStates, keeps_states, reach
from ..methods.rehearsal import Rehearsal, own_text, own_texts, texts_for
from ..methods.sft import CrossEntropy, SftSteps
from ..model.load import Model, load
from ..model.lora import LoraShape, attach_lora
from ..model.sample import Sampling
from ..recipe import Recipe, Update
from ..tensors import Loss, StepSource
from ..texts import beginning
from ..train.checkpoint import load_weights, trainable
from ..train.meter import peak_memory_bytes, release_memory, reset_peak_memory
from ..train.optim import Optimization
from ..train.plan import EVERYWHERE, Prediction, Reach, Settings, derive, flops, predict
from ..types import Example, Grade, Item
from ..world import World
from .begin import Place
from .handed import Made, hand_over, open_made
from .loop import Outcome, Undertaking, best_weights, carry_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A tuned model and what making it took (the `train` part of results.json)."""

    model: Model
    train: dict[str, float]
    valid_metric: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One model about to be trained: its values, how far its tokens go, and what that should take."""

    name: str
    settings: Settings
    reach: Reach
    predicted: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What training reads: examples, and validation rows with the deciding metric."""

    train: Sequence[Example]
    valid: Sequence[Example]
    valid_items: Sequence[Item]
    metric: str
    grade: Grade
    how: Sampling


def tune(place: Place, update: Update, material: Material) -> Tuned:
    """Train, or pick up where an earlier process stopped; a finished update is only loaded."""
    recipe, folder, world, screen = place.recipe, place.folder, place.world, place.screen
    target = folder.handed_over(update)
    record = folder.path / "trained" / f"{update}.json"
    if record.is_file():
        screen.line(f"{update} was trained before; loading {target.name}/")
        known, made = read_json(record), Made(run=folder, recipe=recipe, update=update, path=target)
        return Tuned(model=open_made(made, world), train=known["train"], valid_metric=known["valid_metric"])
    model = load(recipe.base, world, recipe.weights)
    settings = derive(recipe, update, model, material.train)
    rows = min(settings.epochs * len(material.train), settings.batch * (recipe.train.max_steps or math.inf))
    rehearsal = rehearsed(place, texts_for(rows), model)
    shape = attach(recipe, model, settings)
    source = steps_of(recipe, settings, material.train, rehearsal, model, world)
    far = reach(source, model)
    plan = planned(place, update, model, settings, source, CrossEntropy(), far)
    kept = KeptStates(source, model, folder.checkpoints / update) if keeps_states(source, model) else None
    if kept:
        screen.line(kept.told)
    reset_peak_memory()
    outcome = _train(place, model, settings, kept or source, material)
    train = account(place, plan, model, source, outcome)
    if kept:
        kept.forget()
    if world.leads:
        hand_over(model, shape, target)
        write_json(record, {"train": train, "valid_metric": outcome.best["valid_metric"]})
    world.barrier()
    return Tuned(model=model, train=train, valid_metric=outcome.best["valid_metric"])


def attach(recipe: Recipe, model: Model, settings: Settings) -> LoraShape | None:
    """Choose what is trained, adapters on a frozen base or everything, and whether blocks are computed twice."""
    if model.blocks:
        model.blocks.recompute = settings.recompute
    if settings.update == "full":
        return None
    shape = LoraShape(
        rank=settings.rank,
        alpha=recipe.lora.alpha,
        target=tuple(recipe.lora.target) if recipe.lora.target else None,
        seed=recipe.train.seed,
        lowest=settings.lowest,
    )
    attach_lora(model.hf, shape, head=model.head)
    return shape


def rehearsed(place: Place, count: int, base: Model) -> Rehearsal:
    """Texts of the base's own, written once for all updates into rehearsal.jsonl."""
    recipe, world = place.recipe, place.world
    strength, path = recipe.data.rehearse, place.folder.path / "rehearsal.jsonl"
    if not strength:
        return Rehearsal()
    if world.leads and not path.is_file():
        with place.screen.progress("texts of the base's own, to rehearse", count) as tick:
            texts = own_texts(base, count, recipe.train.seed, tick)
        words = [base.tokenizer.decode(text.tokens) for text in texts]
        lines = [{"id": t.id, "text": said, "tokens": t.tokens.tolist()} for t, said in zip(texts, words, strict=True)]
        write_jsonl(path, lines)
    world.barrier()
    begins, lines = beginning(base.tokenizer), read_jsonl(path)
    texts = [own_text(np.array(line["tokens"], dtype=np.int64), line["id"], begins) for line in lines]
    return Rehearsal(texts=texts, strength=strength)


def steps_of(
    recipe: Recipe,
    settings: Settings,
    examples: Sequence[Example],
    rehearsal: Rehearsal,
    model: Model,
    world: World,
) -> SftSteps:
    """The run's batches, step by step."""
    return SftSteps(
        examples,
        rehearsal=rehearsal,
        batch=settings.batch,
        epochs=settings.epochs,
        budget_tokens=settings.microbatch_tokens,
        world=world,
        seed=recipe.train.seed,
        max_steps=recipe.train.max_steps,
        packs=model.packs,
    )


def planned(
    place: Place,
    name: str,
    model: Model,
    settings: Settings,
    source: StepSource,
    loss: Loss,
    reach: Reach = EVERYWHERE,
) -> Plan:
    """The prediction for one model, made once and kept in plan.json; shown with the derived values."""
    folder, screen = place.folder, place.screen
    plan = read_json(folder.plan)
    if name not in plan["arms"]:
        prediction = predict(model, source, loss, settings, reach)
        tokens = np.mean(source.row_tokens()) * source.steps * source.rows_a_step
        plan["arms"][name] = {"steps": source.steps, "tokens": int(tokens), "predicted": asdict(prediction)}
        known = {line["key"] for line in plan["derived"]}
        plan["derived"] += [asdict(line) for line in settings.derived if line.key not in known]
        if place.world.leads:
            write_json(folder.plan, plan)
    prediction = Prediction(**plan["arms"][name]["predicted"])
    screen.derived(settings.derived)
    screen.line(
        f"plan: {source.steps} steps, about {prediction.seconds:.0f} s, "
        f"{prediction.peak_memory_bytes / 1e9:.1f} GB at the peak, {prediction.flops:.2g} FLOPs"
        f"{prediction.source}"
    )
    return Plan(name=name, settings=settings, reach=reach, predicted=prediction)


def account(place: Place, plan: Plan, model: Model, source: StepSource, outcome: Outcome) -> dict[str, Any]:
    """What training took (`train` in results.json); the best weights are put into the model."""
    settings, weights = plan.settings, best_weights(place.folder, plan.name)
    peak = peak_memory_bytes(place.world.device)
    load_weights(model.hf, weights)
    examples = outcome.done.step * source.rows_a_step
    return {
        "seconds": outcome.done.seconds,
        "tokens": outcome.done.tokens,
        "steps": outcome.done.step,
        "best_step": outcome.best["step"],
        "flops": flops(model, settings.update, source.row_tokens(), examples, plan.reach),
        "peak_memory_bytes": peak,
        "trainable_parameters": sum(p.numel() for p in trainable(model.hf).values()),
        "learning_rate": settings.learning_rate,
        "checkpoint_bytes": weights.stat().st_size,
        "valid_loss": outcome.best.get("valid_loss"),
        "predicted": asdict(plan.predicted),
    }


def optimization(recipe: Recipe, settings: Settings) -> Optimization:
    """How weights are moved, as the recipe and the plan have it."""
    return Optimization(
        learning_rate=settings.learning_rate,
        warmup=recipe.train.warmup,
        schedule=recipe.train.schedule,
        weight_decay=recipe.train.weight_decay,
        clip=recipe.train.clip,
        precision=settings.precision,
    )


def _train(place: Place, model: Model, settings: Settings, source: StepSource, material: Material) -> Outcome:
    recipe, update = place.recipe, settings.update

    def describe(line: Mapping[str, float]) -> str:
        return f"validation loss {line['valid_loss']:.4f}, {material.metric} {line['valid_metric']:.3f}"

    work = Undertaking(
        name=update,
        model=model,
        source=source,
        loss=CrossEntropy(),
        how=optimization(recipe, settings),
        watch=lambda step: _validate(update, model, material, place.world),
        decides="valid_loss",
        describe=describe,
        evaluations=recipe.train.evaluations,
        patience=recipe.train.patience,
    )
    return carry_out(work, place.folder, place.world, place.screen)


def _validate(update: Update, model: Model, material: Material, world: World) -> dict[str, float]:
    """Validation loss per token and mean metric; measured on the first rank, known to all."""
    loss = metric = 0.0
    release_memory()  # the training step's memory, free now, is cut in pieces that fit no other shape
    if world.leads:
        sums, counts = example_losses(model, material.valid)
        loss = float(sums.sum() / counts.sum())
        answers = measure(
            model, Prompting(name=update), material.valid_items, {material.metric: material.grade}, material.how
        )
        metric = float(np.mean(answers.scores[material.metric]))
    release_memory()
    loss, metric = world.sum([loss, metric])
    return {"valid_loss": loss, "valid_metric": metric}
