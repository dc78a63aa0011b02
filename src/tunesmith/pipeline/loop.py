"""Training as a run does it, whatever the method: progress, looks at held-out rows, best weights kept, early stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..folder import RunFolder, append_jsonl, read_jsonl, rename_file, write_jsonl
from ..model.load import Model
from ..screen import Screen
from ..tensors import Loss, StepSource
from ..train.checkpoint import save_weights
from ..train.fit import StepDone, fit
from ..train.interrupt import graceful
from ..train.optim import Optimization
from ..world import World

BEYOND = "beyond_limit"
_OF_A_STEP = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "tokens_per_second",
    "memory_bytes",
    "seconds",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Undertaking:
    """One model in training. `watch(step)` looks at held-out rows; the weights with the lowest `decides` are the best.

    A look may say how far `beyond_limit` it lies: it is the best only where none lies nearer, whatever it gained.
    `beside()` gives further numbers for the line of a step, `enough()` a reason to stop after it, or nothing.
    """

    name: str
    model: Model
    source: StepSource
    loss: Loss
    how: Optimization
    watch: Callable[[int], dict[str, float]]
    decides: str
    describe: Callable[[Mapping[str, float]], str]
    evaluations: int
    patience: int
    beside: Callable[[], Mapping[str, float]] = dict
    enough: Callable[[], str] = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The last step done, every look at the held-out rows, and the best of them."""

    done: StepDone
    history: Sequence[Mapping[str, float]]
    best: Mapping[str, float]


def carry_out(work: Undertaking, folder: RunFolder, world: World, screen: Screen) -> Outcome:
    """Train to the end, or go on where an earlier process stopped. The best weights are in `best_weights`."""
    count, steps = work.evaluations, work.source.steps
    looks = {math.ceil(steps * (n + 1) / count) for n in range(count)}
    history: list[dict[str, float]] | None = None
    done: StepDone | None = None
    with screen.progress(f"{work.name}: training", steps) as tick, graceful(screen.warn) as stop:
        for done in fit(work.model, work.source, work.loss, work.how, folder.checkpoints / work.name, world, stop=stop):
            if history is None:
                history = _history(folder, work, before=done.step, leads=world.leads)
            _announce(done, screen)
            if world.leads:
                append_jsonl(folder.metrics, _step_line(work, done))
            tick(
                done.step,
                f"loss {done.loss:.3f}  {done.tokens_per_second:.0f} tokens/s  {done.memory_bytes / 1e9:.1f} GB",
            )
            reason = work.enough()
            if done.step in looks or reason:
                line = {"step": done.step, **_seen_by_the_first(work.watch(done.step), world)}
                history.append(line)
                _keep_if_best(folder, work, history, world)
                screen.line(f"step {done.step}: {work.describe(line)}")
                if not reason and _worse_for(history, work) >= work.patience:
                    reason = f"no better for {work.patience} evaluations"
                if reason:
                    screen.line(f"stopped early: {reason}")
                    break
    if done is None:
        done = _last_step(folder, work.name)
        history = _history(folder, work, before=steps + 1, leads=world.leads)
    assert history
    return Outcome(done=done, history=history, best=min(history, key=lambda line: _cost(line, work)))


def best_weights(folder: RunFolder, name: str) -> Path:
    """The trained parameters at the best look."""
    return folder.checkpoints / name / "best.safetensors"


def _seen_by_the_first(look: Mapping[str, float], world: World) -> dict[str, float]:
    """The first rank's look, for all: ranks that saw otherwise, by a judge that draws, would stop at other steps."""
    return dict(zip(look, world.sum([value if world.leads else 0.0 for value in look.values()]), strict=True))


def _keep_if_best(folder: RunFolder, work: Undertaking, history: list[dict[str, float]], world: World) -> None:
    """Keep the weights if this evaluation is the best; then write its line, so that a kill between repeats both."""
    if not world.leads:
        return
    if _worse_for(history, work) == 0:
        path = best_weights(folder, work.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_weights(work.model.hf, aside)
        rename_file(aside, path)
    append_jsonl(folder.metrics, {"arm": work.name, **history[-1]})


def _cost(look: Mapping[str, float], work: Undertaking) -> tuple[float, float]:
    """What makes one look better than another, the lowest being the best."""
    return look.get(BEYOND, 0.0), look[work.decides]


def _worse_for(history: Sequence[Mapping[str, float]], work: Undertaking) -> int:
    """How many evaluations ago the best was seen."""
    costs = [_cost(line, work) for line in history]
    return len(costs) - 1 - costs.index(min(costs))


def _history(folder: RunFolder, work: Undertaking, *, before: int, leads: bool) -> list[dict[str, float]]:
    """Evaluations before step `before`; lines of steps that a crash undid are removed from the file."""
    lines = read_jsonl(folder.metrics)
    kept = [line for line in lines if line["arm"] != work.name or line["step"] < before]
    if leads and len(kept) != len(lines):
        write_jsonl(folder.metrics, kept)
    mine = [line for line in kept if line["arm"] == work.name and work.decides in line]
    return [{key: value for key, value in line.items() if key != "arm"} for line in mine]


def _announce(done: StepDone, screen: Screen) -> None:
    for problem in done.damaged:
        screen.warn(f"a damaged checkpoint was set aside: {problem}")
    if done.resumed:
        screen.line(done.resumed)


def _step_line(work: Undertaking, done: StepDone) -> dict[str, object]:
    values = asdict(done)
    return {"arm": work.name, **{key: values[key] for key in _OF_A_STEP}, **done.report, **work.beside()}


def _last_step(folder: RunFolder, name: str) -> StepDone:
    """The last step as metrics.jsonl has it: every step was finished before this process began."""
    line = [line for line in read_jsonl(folder.metrics) if line["arm"] == name and "loss" in line][-1]
    return StepDone(**{key: line[key] for key in _OF_A_STEP}, steps=line["step"])
