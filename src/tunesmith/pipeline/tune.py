"""Train one update (LoRA or full): plan, loop, validation, best weights, hand-over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..evaluate.measure import example_losses, measure
from ..evaluate.systems import Prompting
from ..folder import RunFolder, append_jsonl, read_json, read_jsonl, rename_file, write_json, write_jsonl
from ..methods.sft import CrossEntropy, SftSteps
from ..model.adapters import load_adapter, save_adapter, save_model
from ..model.load import Model, load
from ..model.lora import LoraShape, attach_lora
from ..model.sample import Sampling
from ..recipe import Recipe, Update
from ..screen import Screen
from ..train.checkpoint import load_weights, save_weights, trainable
from ..train.fit import StepDone, fit
from ..train.interrupt import graceful
from ..train.meter import peak_memory_bytes, release_memory, reset_peak_memory
from ..train.optim import Optimization
from ..train.plan import Prediction, Settings, derive, flops, predict
from ..types import Example, Grade, Item
from ..world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A tuned model and what making it took (the `train` part of results.json)."""

    model: Model
    train: dict[str, float]
    valid_metric: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What training reads: examples, and validation rows with the deciding metric."""

    train: Sequence[Example]
    valid: Sequence[Example]
    valid_items: Sequence[Item]
    metric: str
    grade: Grade
    how: Sampling


def tune(
    recipe: Recipe,
    update: Update,
    material: Material,
    folder: RunFolder,
    world: World,
    screen: Screen,
) -> Tuned:
    """Train, or pick up where an earlier process stopped; a finished update is only loaded."""
    target = folder.adapter if update == "lora" else folder.model
    record = folder.path / "trained" / f"{update}.json"
    if record.is_file():
        screen.line(f"{update} was trained before; loading {target.name}/")
        return _finished(recipe, update, target, read_json(record), world)
    model = load(recipe.base, world)
    settings = derive(recipe, update, model, material.train)
    shape = attach(recipe, update, model, settings)
    source = steps_of(recipe, settings, material.train, model, world)
    prediction = _planned(folder, update, settings, source, model, material, screen, world)
    reset_peak_memory()
    done, history = _train(recipe, update, model, settings, source, material, folder, world, screen)
    peak = peak_memory_bytes(world.device)
    best = min(history, key=lambda line: line["valid_loss"])
    load_weights(model.hf, _best(folder, update))
    train = {
        "seconds": done.seconds,
        "tokens": done.tokens,
        "steps": done.step,
        "best_step": best["step"],
        "flops": flops(model, update, [len(e.tokens) for e in material.train], done.step * settings.batch),
        "peak_memory_bytes": peak,
        "trainable_parameters": sum(p.numel() for p in trainable(model.hf).values()),
        "learning_rate": settings.learning_rate,
        "checkpoint_bytes": _best(folder, update).stat().st_size,
        "valid_loss": best["valid_loss"],
        "predicted": asdict(prediction),
    }
    if world.leads:
        if update == "lora":
            save_adapter(model, shape, target)
        else:
            save_model(model, target)
        write_json(record, {"train": train, "valid_metric": best["valid_metric"]})
    world.barrier()
    return Tuned(model=model, train=train, valid_metric=best["valid_metric"])


def attach(recipe: Recipe, update: Update, model: Model, settings: Settings) -> LoraShape:
    """Choose what is trained: adapters on a frozen base, or everything."""
    target = tuple(recipe.lora.target) if recipe.lora.target else None
    shape = LoraShape(rank=max(settings.rank, 1), alpha=recipe.lora.alpha, target=target, seed=recipe.train.seed)
    if update == "lora":
        attach_lora(model.hf, shape, head=model.head)
    return shape


def steps_of(recipe: Recipe, settings: Settings, examples: Sequence[Example], model: Model, world: World) -> SftSteps:
    """The run's batches, step by step."""
    return SftSteps(
        examples,
        batch=settings.batch,
        epochs=settings.epochs,
        budget_tokens=settings.microbatch_tokens,
        world=world,
        seed=recipe.train.seed,
        max_steps=recipe.train.max_steps,
        packs=model.packs,
    )


def _planned(
    folder: RunFolder,
    update: Update,
    settings: Settings,
    source: SftSteps,
    model: Model,
    material: Material,
    screen: Screen,
    world: World,
) -> Prediction:
    """The prediction of this update, made once and kept in plan.json; shown with the derived values."""
    plan = read_json(folder.plan)
    if update not in plan["arms"]:
        sizes = [len(example.tokens) for example in material.train]
        prediction = predict(model, source, CrossEntropy(), update, sizes, settings.batch)
        tokens = sum(sizes) / len(sizes) * source.steps * settings.batch
        plan["arms"][update] = {"steps": source.steps, "tokens": int(tokens), "predicted": asdict(prediction)}
        known = {line["key"] for line in plan["derived"]}
        plan["derived"] += [asdict(line) for line in settings.derived if line.key not in known]
        if world.leads:
            write_json(folder.plan, plan)
    prediction = Prediction(**plan["arms"][update]["predicted"])
    screen.derived(settings.derived)
    screen.line(
        f"plan: {source.steps} steps, about {prediction.seconds:.0f} s, "
        f"{prediction.peak_memory_bytes / 1e9:.1f} GB at the peak, {prediction.flops:.2g} FLOPs"
    )
    return prediction


def _train(
    recipe: Recipe,
    update: Update,
    model: Model,
    settings: Settings,
    source: SftSteps,
    material: Material,
    folder: RunFolder,
    world: World,
    screen: Screen,
) -> tuple[StepDone, list[dict[str, float]]]:
    """The loop with validation: keeps the weights of the lowest validation loss, stops when it no longer falls."""
    how = Optimization(
        learning_rate=settings.learning_rate,
        warmup=recipe.train.warmup,
        schedule=recipe.train.schedule,
        weight_decay=recipe.train.weight_decay,
        clip=recipe.train.clip,
    )
    looks = {math.ceil(source.steps * (n + 1) / recipe.train.evaluations) for n in range(recipe.train.evaluations)}
    checkpoints = folder.checkpoints / update
    history: list[dict[str, float]] | None = None
    done: StepDone | None = None
    with screen.progress(f"{update}: training", source.steps) as tick, graceful(screen.warn) as stop:
        for done in fit(model, source, CrossEntropy(), how, checkpoints, world, stop=stop):
            if history is None:
                history = _history(folder, update, before=done.step, leads=world.leads)
            _announce(done, screen)
            if world.leads:
                append_jsonl(folder.metrics, _step_line(update, done))
            tick(
                done.step,
                f"loss {done.loss:.3f}  {done.tokens_per_second:.0f} tokens/s  {done.memory_bytes / 1e9:.1f} GB",
            )
            if done.step in looks:
                line = _validate(update, done.step, model, material, world)
                history.append(line)
                _keep_if_best(folder, update, model, history, world)
                found = f"validation loss {line['valid_loss']:.4f}, {material.metric} {line['valid_metric']:.3f}"
                screen.line(f"step {done.step}: {found}")
                if _worse_for(history) >= recipe.train.patience:
                    screen.line(f"stopped early: no better validation loss for {recipe.train.patience} evaluations")
                    break
    if done is None:
        return _last_step(folder, update), _history(folder, update, before=source.steps + 1, leads=world.leads)
    assert history
    return done, history


def _validate(update: Update, step: int, model: Model, material: Material, world: World) -> dict[str, float]:
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
    return {"step": step, "valid_loss": loss, "valid_metric": metric}


def _keep_if_best(
    folder: RunFolder, update: Update, model: Model, history: list[dict[str, float]], world: World
) -> None:
    """Keep the weights if this evaluation is the best; then write its line, so that a kill between repeats both."""
    if not world.leads:
        return
    if _worse_for(history) == 0:
        path = _best(folder, update)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_weights(model.hf, aside)
        rename_file(aside, path)
    append_jsonl(folder.metrics, {"arm": update, **history[-1]})


def _worse_for(history: Sequence[dict[str, float]]) -> int:
    """How many evaluations ago the lowest validation loss was seen."""
    losses = [line["valid_loss"] for line in history]
    return len(losses) - 1 - losses.index(min(losses))


def _history(folder: RunFolder, update: Update, *, before: int, leads: bool) -> list[dict[str, float]]:
    """Evaluations before step `before`; lines of steps that a crash undid are removed from the file."""
    lines = read_jsonl(folder.metrics)
    kept = [line for line in lines if line["arm"] != update or line["step"] < before]
    if leads and len(kept) != len(lines):
        write_jsonl(folder.metrics, kept)
    wanted = ("step", "valid_loss", "valid_metric")
    return [{key: line[key] for key in wanted} for line in kept if line["arm"] == update and "valid_loss" in line]


def _announce(done: StepDone, screen: Screen) -> None:
    for problem in done.damaged:
        screen.warn(f"a damaged checkpoint was set aside: {problem}")
    if done.resumed:
        screen.line(done.resumed)


def _step_line(update: Update, done: StepDone) -> dict[str, object]:
    wanted = (
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens",
        "tokens_per_second",
        "memory_bytes",
        "seconds",
    )
    values = asdict(done)
    return {"arm": update, **{key: values[key] for key in wanted}}


def _last_step(folder: RunFolder, update: Update) -> StepDone:
    """The last step as metrics.jsonl has it: every step was finished before this process began."""
    line = [line for line in read_jsonl(folder.metrics) if line["arm"] == update and "loss" in line][-1]
    line.pop("arm")
    return StepDone(**line, steps=line["step"], scored_tokens=0)


def _best(folder: RunFolder, update: Update) -> Path:
    return folder.checkpoints / update / "best.safetensors"


def _finished(recipe: Recipe, update: Update, target: Path, record: dict, world: World) -> Tuned:
    if update == "lora":
        model = load(recipe.base, world)
        load_adapter(model, target)
    else:
        model = load(str(target), world)
    return Tuned(model=model, train=record["train"], valid_metric=record["valid_metric"])
