"""The learning-rate sweep behind the derived values: validation loss and general loss by update and rate.

python bench/sweep.py legal_citations 320
python bench/sweep.py icd10cm_chapters 640 lora 3e-4 6e-4
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tunesmith.data.curate import curate
from tunesmith.data.read import read
from tunesmith.data.render import render
from tunesmith.data.split import split
from tunesmith.evaluate.forgetting import general_ability
from tunesmith.evaluate.measure import example_losses
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.recipe import DataSpec
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.world import World

RATES = {"lora": (6e-4, 1.3e-3, 2.6e-3), "full": (6e-5, 1.3e-4, 2.6e-4)}
VALID_ROWS, BATCH = 48, 8


def main() -> None:
    """Train each (update, rate) from the same base on the same rows and print validation losses."""
    task, rows = sys.argv[1], int(sys.argv[2])
    tried = {sys.argv[3]: [float(rate) for rate in sys.argv[4:]]} if sys.argv[3:] else RATES
    spec = DataSpec(train=f"builtin:{task}", rows=rows + 400, valid=0.2, test=0.0)
    kept, _ = curate(split(read(spec.train, spec), spec), spec)
    for update, rates in tried.items():
        for rate in rates:
            model = load("smollm2-135m-instruct", World())
            train = [e for row in kept.train[:rows] for e in render(row, model.tokenizer, model.eos_ids)]
            valid = [e for row in kept.valid[:VALID_ROWS] for e in render(row, model.tokenizer, model.eos_ids)]
            if update == "lora":
                attach_lora(model.hf, LoraShape(rank=16, alpha=32.0), head=model.head)
            source = SftSteps(train, batch=BATCH, epochs=1, budget_tokens=2048, world=World())
            with tempfile.TemporaryDirectory() as folder:
                *_, done = fit(model, source, CrossEntropy(), Optimization(learning_rate=rate), Path(folder), World())
            sums, counts = example_losses(model, valid)
            general = float(general_ability(model, ()).losses.mean())
            line = {"task": task, "update": update, "rate": rate, "steps": done.step, "general_loss": general}
            line["valid_loss"] = float(sums.sum() / counts.sum())
            print(json.dumps(line | {"seconds": round(done.seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
