"""Forward and backward passes of a few micro-batches before the first step, weights untouched: seconds and memory.

What took long is kept in the cache for some days under a hash of all that it depends on, so that the next run over the
same rows, with another learning rate, begins at once. Not on a GPU, where the first passes compile kernels anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import FolderError, TrainingError
from ..folder import cache_folder, read_json, sha256_file, write_json
from ..model import score as scoring
from ..model.attention import PackedAttention
from ..model.filler import filled
from ..model.linear import Precision, products_in
from ..model.load import Model
from ..model.score import score
from ..tensors import Batch, Loss, StepSource
from .checkpoint import trainable
from .meter import machine, memory_bytes, own_bytes, peak_memory_bytes, reset_peak_memory

TIMED_STEPS, SEARCHED_STEPS = 4, 64
CROWDED = 1.5  # processes that want to run, for each processor
ENOUGH_SECONDS = 3.0  # after which no further micro-batch is timed
WORTH_KEEPING_SECONDS, KEPT_SECONDS = 2.0, 7 * 86_400  # a machine is not as busy for ever as it was then


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What passes took: seconds a step without the optimizer, and bytes at the peak beyond those before.

    `crowded`: while they were timed, other programs wanted the processor too.
    """

    step_seconds: float
    peak_bytes: float
    remembered: bool = False
    crowded: bool = False


def look_at(source: StepSource) -> tuple[Batch, list[Any]]:
    """The heaviest micro-batch of steps spread over the run, and how each is laid out."""
    heaviest, shapes = None, []
    for one in (one for step in _spread(source.steps, SEARCHED_STEPS) for one in source(step)):
        shapes.append([one.layout.lengths, one.layout.parents, len(one.index), sorted(one.extra)])
        heaviest = one if heaviest is None or len(one.tokens) > len(heaviest.tokens) else heaviest
    assert heaviest
    return heaviest, shapes


def dry_run(
    model: Model,
    source: StepSource,
    loss: Loss,
    heaviest: Batch,
    shapes: Sequence[Any],
    spared: float,
    precision: Precision,
) -> DryRun:
    """What the steps of a run take, timed or known from an equal one on this machine.

    `spared` is the share of passes through frozen lower blocks that kept states save (economy). Raises TrainingError
    where a GPU's memory is too small for the heaviest micro-batch.
    """
    if model.device.type == "cuda":
        return _timed(model, source, loss, heaviest, spared, precision)
    try:
        place = cache_folder() / "dry_runs" / f"{_name(model, source, loss, [precision, shapes, spared])}.json"
    except (FolderError, RuntimeError):  # code without its sources, or no home
        return _timed(model, source, loss, heaviest, spared, precision)
    with suppress(OSError, FolderError, TypeError):  # none yet, or not one of ours
        if time.time() - place.stat().st_mtime < KEPT_SECONDS:
            return DryRun(**read_json(place), remembered=True)
    began = time.monotonic()
    found = _timed(model, source, loss, heaviest, spared, precision)
    if os.getloadavg()[0] > CROWDED * (os.cpu_count() or 1):  # threads wait for each other: up to ten times as long
        return replace(found, crowded=True)
    if time.monotonic() - began > WORTH_KEEPING_SECONDS:
        with suppress(FolderError):
            write_json(place, {"step_seconds": found.step_seconds, "peak_bytes": found.peak_bytes})
    return found


def resting_bytes(model: Model) -> int:
    """What is held before a pass. Weights mapped from files count whole, of which the system may have dropped pages."""
    mapped = [p for p in model.hf.parameters() if p.dtype in (torch.bfloat16, torch.float16) and p.device.type == "cpu"]
    held = own_bytes() + sum(p.numel() * p.element_size() for p in mapped)
    return max(memory_bytes(model.device), held if mapped else 0)


def _name(model: Model, source: StepSource, loss: Loss, further: Sequence[Any]) -> str:
    """A hash of machine, code, model as it is trained, and `further`: the layout of its micro-batches."""
    code = [Path(__file__), *sorted(Path(scoring.__file__).parent.glob("*.py"))]
    parameters = [[name, p.shape, str(p.dtype), p.requires_grad] for name, p in model.hf.named_parameters()]
    facts = [
        [__version__, *map(sha256_file, code)],
        machine(model.device),
        [model.hf.config.to_dict(), parameters, model.packs, bool(model.blocks and model.blocks.recompute)],
        [type(loss).__name__, sorted(loss.needs), source.steps, *further],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _timed(
    model: Model, source: StepSource, loss: Loss, heaviest: Batch, spared: float, precision: Precision
) -> DryRun:
    """The heaviest micro-batch first, which decides on memory, then others by the clock."""
    steps = [source(step) for step in _spread(source.steps, TIMED_STEPS)]
    reset_peak_memory()
    resting = resting_bytes(model)
    _pass(model, heaviest, loss, precision)
    if model.device.type == "cuda":  # kernels are compiled for a second length before the clock starts
        _pass(model, steps[-1][-1], loss, precision)
    spent = tokens_timed = dry_seconds = 0.0
    for one in _in_turn(steps[1:] or steps):
        if dry_seconds > ENOUGH_SECONDS:
            break
        took = _seconds(lambda one=one: _pass(model, one, loss, precision))
        below = _seconds(lambda one=one: _pass_below(model, one)) if spared else 0.0
        dry_seconds += took + below
        spent += took - spared * below
        tokens_timed += len(one.tokens)
    peak = peak_memory_bytes(model.device)
    for parameter in trainable(model.hf).values():
        parameter.grad = None
    step_tokens = sum(len(one.tokens) for step in steps for one in step) / len(steps)
    return DryRun(step_seconds=spent / tokens_timed * step_tokens, peak_bytes=float(peak - resting))


def _spread(steps: int, count: int) -> list[int]:
    """At most `count` steps, evenly over the run."""
    return sorted({int(step) for step in np.linspace(0, steps - 1, count)})


def _in_turn(steps: Sequence[Sequence[Batch]]) -> Iterator[Batch]:
    """The first micro-batch of each step, then the second of each, and so on."""
    return (one for together in zip_longest(*steps) for one in together if one is not None)


def _seconds(work: Callable[[], None]) -> float:
    start = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - start


def _pass(model: Model, batch: Batch, loss: Loss, precision: Precision) -> None:
    batch = batch.to(model.device)
    try:
        with products_in(precision):
            (loss(score(model, batch, loss.needs), batch).sum / max(loss.count(batch), 1)).backward()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"a micro-batch of {len(batch.tokens):,} tokens does not fit the GPU's memory",
            where="train.microbatch_tokens",
            fix="Set it lower, or choose update: lora, shorter rows (data.max_tokens) or a smaller base.",
        ) from error


def _pass_below(model: Model, batch: Batch) -> None:
    assert model.blocks
    batch = filled(batch.to(model.device))
    model.blocks.below(model.blocks.frozen, batch.tokens, batch.positions, PackedAttention(batch.layout))
