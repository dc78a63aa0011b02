"""The only training loop. Which method it runs is decided by two arguments: where batches come from, and the loss.

It yields after each step; whoever iterates may evaluate, print or stop. What it yields for a step is settled before the
step's checkpoint is written, so a resumed run misses no evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Interrupted, TrainingError
from ..model.linear import products_in
from ..model.load import Model
from ..model.score import score
from ..tensors import Batch, Loss, StepSource
from ..world import World
from .checkpoint import resume, save_checkpoint, tidy, trainable
from .meter import memory_bytes, release_memory
from .optim import Optimization, adamw, learning_rate

WARM_STEPS, GROWTH = 3, 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """What one optimizer step did. `loss` is a mean per scored token; counts run from the start of training."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    tokens_per_second: float
    memory_bytes: int
    report: Mapping[str, float] = field(default_factory=dict)
    resumed: str = ""
    damaged: tuple[str, ...] = ()


def fit(
    model: Model,
    source: StepSource,
    loss: Loss,
    how: Optimization,
    checkpoints: Path,
    world: World,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepDone]:
    """Train `model` until `source.steps`, from the newest good checkpoint in `checkpoints`.

    Raises TrainingError naming step and rows if the loss or the gradient is not finite, Interrupted when `stop()`.
    """
    parameters = trainable(model.hf)
    optimizer = adamw(parameters.values(), how)
    saved = resume(checkpoints, model.hf, optimizer)
    first = saved.step if saved else 0
    totals = dict(saved.state) if saved else {}
    tokens, seconds = totals.get("tokens", 0.0), totals.get("seconds", 0.0)
    last_save = time.monotonic()
    note = f"resumed after step {first}" if first else ""
    damaged = tuple(f"{name}: {problem}" for name, problem in saved.damaged.items()) if saved else ()
    world.barrier()
    if world.leads:
        tidy(checkpoints, tuple(saved.damaged) if saved else ())
    settled_bytes = 0
    for step in range(first, source.steps):
        start = time.monotonic()
        batches = [batch.to(world.device) for batch in source(step)]
        value, norm, report = _step(model, batches, loss, optimizer, step, source.steps, how, world)
        (here,) = world.sum([float(sum(batch.layout.real_tokens for batch in batches))])
        took = time.monotonic() - start
        tokens, seconds = tokens + here, seconds + took
        yield StepDone(
            step=step + 1,
            steps=source.steps,
            loss=value,
            gradient_norm=norm,
            learning_rate=learning_rate(step, source.steps, how),
            tokens=int(tokens),
            seconds=seconds,
            tokens_per_second=here / took,
            memory_bytes=memory_bytes(world.device),
            report=report,
            resumed=note,
            damaged=damaged,
        )
        note, damaged = "", ()
        settled_bytes = _settle(step - first, settled_bytes, world)
        stopped = world.sum([float(stop())])[0] > 0
        due = time.monotonic() - last_save > how.checkpoint_seconds or step + 1 == source.steps
        if world.leads and (due or stopped):
            state = {"tokens": tokens, "seconds": seconds}
            save_checkpoint(checkpoints, step + 1, model.hf, optimizer, state)
            last_save = time.monotonic()
        if stopped and step + 1 < source.steps:
            raise Interrupted(f"stopped after step {step + 1} of {source.steps}", fix="Run the same command to go on.")


def _settle(steps_here: int, settled_bytes: int, world: World) -> int:
    """Hold memory near what the first steps took; returns that size."""
    now = memory_bytes(world.device)
    if steps_here < WARM_STEPS:
        return max(settled_bytes, now)
    if world.device.type == "cpu" and now > GROWTH * settled_bytes:
        release_memory()
    return settled_bytes


def _step(
    model: Model,
    batches: Sequence[Batch],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    step: int,
    steps: int,
    how: Optimization,
    world: World,
) -> tuple[float, float, dict[str, float]]:
    """One optimizer step: loss per unit of the denominator, gradient norm, further means."""
    (total,) = world.sum([sum(loss.count(batch) for batch in batches)])
    if not total:
        raise TrainingError(
            f"no token is trained in step {step + 1}",
            where=_rows(batches),
            fix="Look at the rows with `tunesmith check`.",
        )
    optimizer.zero_grad(set_to_none=True)
    values: list[Tensor] = []  # read after the last pass: a GPU need not wait for each
    report: dict[str, float] = {}
    for batch in batches:
        with products_in(how.precision):
            terms = loss(score(model, batch, loss.needs), batch)
            (terms.sum / total).backward()
        values.append(terms.sum.detach())
        for key, term in terms.report.items():
            report[key] = report.get(key, 0.0) + term
    parameters = list(trainable(model.hf).values())
    world.sum_gradients(parameters)
    value, *sums = world.sum([sum(map(float, values)), *report.values()])
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, how.clip))
    if not (math.isfinite(value) and math.isfinite(norm)):
        what = "loss" if not math.isfinite(value) else "gradient"
        raise TrainingError(
            f"the {what} of step {step + 1} is not a finite number; the weights are those before it",
            where=_rows(batches),
            fix="Lower train.learning_rate, or look at these rows with `tunesmith check`.",
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, how)
    optimizer.step()
    return value / total, norm, {key: part / total for key, part in zip(report, sums, strict=True)}


def _rows(batches: Sequence[Batch]) -> str:
    ids = [name for batch in batches for name in batch.ids]
    return "rows " + ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
