"""Where the time of a training step goes: products, attention, the model's other arithmetic, the optimizer, the rest.

    python bench/overhead.py [--update lora|full] [--rows even|uneven] [--steps 6]

A profiler adds up each operation's own time, without that of operations it calls. What is left of the steps' time on
the clock is Python, autograd's bookkeeping and the profiler itself; steps are timed without it too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))

from tunesmith.data.pack import pack
from tunesmith.methods.sft import CrossEntropy
from tunesmith.model.linear import Precision, products_in
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.model.score import score
from tunesmith.train.checkpoint import trainable
from tunesmith.train.optim import Optimization, adamw
from tunesmith.types import Example
from tunesmith.world import World

LENGTHS = {"even": (96, 96), "uneven": (45, 350)}
PRODUCTS = ("mm", "addmm", "addmm_", "_linear_pointwise", "linear", "mkldnn")
ATTENTION = ("bmm", "baddbmm", "softmax", "scaled_dot_product", "Branch")


def main() -> None:
    """One JSON line: shares of the steps' time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", choices=["lora", "full"], default="lora")
    parser.add_argument("--rows", choices=list(LENGTHS), default="even")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    model = load("smollm2-135m-instruct", World())
    if args.update == "lora":
        attach_lora(model.hf, LoraShape(rank=16, alpha=32), head=model.head)
    optimizer = adamw(trainable(model.hf).values(), Optimization(learning_rate=1e-4))
    steps = [rows(step, *LENGTHS[args.rows]) for step in range(args.steps)]
    take(model, optimizer, steps[0], args.precision)
    start = time.perf_counter()
    for step in steps:
        take(model, optimizer, step, args.precision)
    plain = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for step in steps:
            take(model, optimizer, step, args.precision)
        watched = time.perf_counter() - start
    found = Counter[str]()
    for event in profiler.key_averages():
        found[kind(event.key)] += event.self_cpu_time_total / 1e6
    shares = {name: round(seconds / watched, 4) for name, seconds in found.most_common()}
    shares["outside operations"] = round(1 - sum(found.values()) / watched, 4)
    print(
        json.dumps(
            {
                "update": args.update,
                "rows": args.rows,
                "step_seconds": round(plain / args.steps, 3),
                "profiled_over_plain": round(watched / plain, 3),
                **shares,
            }
        )
    )


def rows(seed: int, shortest: int, longest: int) -> list[Example]:
    """Eight rows of random tokens, the last third of each trained."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(8):
        length = int(draw.integers(shortest, longest + 1))
        weights = (np.arange(length) >= 2 * length // 3).astype(np.float32)
        found.append(Example(tokens=draw.integers(100, 40_000, length), weights=weights, id=str(number)))
    return found


def take(model: Model, optimizer: torch.optim.Optimizer, examples: list[Example], precision: Precision) -> None:
    """One step as train/fit.py takes it."""
    loss = CrossEntropy()
    batches = pack(examples, budget_tokens=2048)
    total = sum(loss.count(batch) for batch in batches)
    optimizer.zero_grad(set_to_none=True)
    with products_in(precision):
        for batch in batches:
            (loss(score(model, batch, loss.needs), batch).sum / total).backward()
    torch.nn.utils.clip_grad_norm_(list(trainable(model.hf).values()), 1.0)
    optimizer.step()


def kind(name: str) -> str:
    """What an operation belongs to."""
    plain = name.split("::")[-1]
    if plain in PRODUCTS or "linear" in plain:
        return "products"
    if any(part in plain for part in ATTENTION):
        return "attention"
    if name.startswith("Optimizer") or "_foreach" in plain or "adamw" in plain:
        return "optimizer"
    if name.startswith("aten"):
        return "other arithmetic"
    return "autograd nodes"


if __name__ == "__main__":
    main()
