"""Economy against full fine-tuning and LoRA: held-out rows right, loss, FLOPs and seconds, from the same rows.

python bench/economy.py icd10cm_chapters 300 full lora economy:0.33 economy:0.17
python bench/economy.py icd10cm_chapters 300 economy:0.33:2.6e-3 full:::1    # another learning rate; one epoch

Processor seconds of training stand beside seconds: they count where other programs run on the machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.curate import curate
from tunesmith.data.read import items, read
from tunesmith.data.render import render
from tunesmith.data.split import Splits, split
from tunesmith.evaluate.measure import example_losses, measure
from tunesmith.evaluate.metrics import find_metric
from tunesmith.evaluate.systems import Prompting
from tunesmith.methods.economy import KeptStates, keeps_states, reach
from tunesmith.methods.rehearsal import Rehearsal
from tunesmith.methods.sft import CrossEntropy
from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling
from tunesmith.pipeline.prepare import answer_room
from tunesmith.pipeline.rows import answer_tokens
from tunesmith.pipeline.tune import attach, optimization, steps_of
from tunesmith.recipe import DataSpec, TaskSpec, Update, parse_recipe
from tunesmith.train.fit import fit
from tunesmith.train.plan import derive, flops
from tunesmith.types import Example
from tunesmith.world import World

VALID_ROWS, TEST_ROWS, EPOCHS, BATCH = 64, 100, 3, 8


def main() -> None:
    """Train each update and print a line for it; the first line is the base."""
    task, count, *tried = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    spec = DataSpec(train=f"builtin:{task}", rows=2 * count + 400, valid=0.2, test=0.2)
    rows, _ = curate(split(read(spec.train, spec), spec), spec)
    model = load("smollm2-135m-instruct", World())
    train, valid = (
        [example for row in part for example in render(row, model.tokenizer, model.eos_ids)]
        for part in (rows.train[:count], rows.valid[:VALID_ROWS])
    )
    how = Sampling(max_new_tokens=answer_room(max(answer_tokens(example) for example in train)))
    for name in ["base", *tried]:
        update, upper, rate, epochs = [*name.split(":"), "", "", ""][:4]
        model = load("smollm2-135m-instruct", World())
        line: dict[str, Any] = {"task": task, "update": name}
        if update != "base":
            lora = {"upper": float(upper or 0.33), "learning_rate": float(rate) if rate else None}
            line |= trained(model, update, lora, train, float(epochs or EPOCHS))  # type: ignore[arg-type]
        print(json.dumps(line | judged(model, rows, valid, how)), flush=True)


def trained(
    model: Model, update: Update, lora: dict[str, float | None], rows: list[Example], epochs: float
) -> dict[str, Any]:
    """Train as a run does, without looks, and say what it took."""
    raw = {"data": {"train": "builtin"}, "update": update, "lora": lora, "train": {"epochs": epochs, "batch": BATCH}}
    recipe = parse_recipe(raw)
    settings = derive(recipe, update, model, rows)
    attach(recipe, model, settings)
    source = steps_of(recipe, settings, rows, Rehearsal(), model, World())
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptStates(source, model, Path(folder)) if keeps_states(source, model) else source
        *_, done = fit(model, kept, CrossEntropy(), optimization(recipe, settings), Path(folder), World())
    took = flops(model, update, source.row_tokens(), done.step * BATCH, reach(source, model))
    return {
        "rate": settings.learning_rate,
        "rank": settings.rank,
        "steps": done.step,
        "tokens": done.tokens,
        "flops": took,
        "seconds": round(done.seconds, 1),
        "processor_seconds": round(time.process_time() - started, 1),
    }


def judged(model: Model, rows: Splits, valid: list[Example], how: Sampling) -> dict[str, float]:
    """Validation loss in nats a token, and the share of test rows answered exactly."""
    sums, counts = example_losses(model, valid)
    grade = {"exact_match": find_metric("exact_match", TaskSpec(), Path())}
    found = measure(model, Prompting(name="base"), items(rows.test[:TEST_ROWS]), grade, how)
    return {
        "valid_loss": round(float(sums.sum() / counts.sum()), 4),
        "exact_match": float(np.mean(found.scores["exact_match"])),
        "test_rows": len(found.ids),
    }


if __name__ == "__main__":
    main()
