"""Our side of the comparison with TRL: one supervised job, printed as one JSON line.

    python bench/sft.py --train rows.jsonl --valid valid.jsonl --limit 96 --batch 8 --update lora

The same job as the peer's script: batches of 8 rows, one epoch, rank 16 on all linear layers, alpha 32, clipping at 1.
Tokens are real tokens of the rows; nothing is counted for the prefix that we compute once and share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from tunesmith.data.layout import as_dict
from tunesmith.data.read import read
from tunesmith.data.render import prompt_tokens, render
from tunesmith.evaluate.measure import example_losses
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.model.score import score
from tunesmith.recipe import DataSpec
from tunesmith.train.fit import fit
from tunesmith.train.meter import peak_memory_bytes, reset_peak_memory
from tunesmith.train.optim import Optimization
from tunesmith.types import Conversation, Example
from tunesmith.world import world_from_env


def as_the_peer_scores(row: Conversation, model: Model) -> Example:
    """Every token after the prompt counts, also the template's line end after the end of turn, as in the peer's script.

    We neither train nor report that line end; it is here only so that the two validation losses are of the same tokens.
    """
    turns = [as_dict(message) for message in row.messages]
    head = len(prompt_tokens(row.prompt, model.tokenizer))
    ids = np.array(model.tokenizer.apply_chat_template(turns)["input_ids"], dtype=np.int64)
    return Example(tokens=ids, weights=(np.arange(len(ids)) >= head).astype(np.float32), id=row.id)


def warmed(source: SftSteps, model: Model) -> float:
    """Seconds of a few passes before the clock starts, in which a GPU's kernels are compiled; no weight moves."""
    start = time.perf_counter()
    for step in range(min(3, source.steps)):
        for batch in source(step):
            there = batch.to(model.device)
            CrossEntropy()(score(model, there), there).sum.backward()
    model.hf.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    """Train once and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--update", choices=["lora", "full"], default="lora")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0, help="order of the rows and the adapter's start")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--budget", type=int, default=2048, help="tokens in one forward pass")
    args = parser.parse_args()
    world = world_from_env()
    model = load(args.base, world)

    def examples(path: str, limit: int | None) -> list[Example]:
        rows = list(read(path, DataSpec(train=path, rows=limit)))
        return [example for row in rows for example in render(row, model.tokenizer, model.eos_ids)]

    train = examples(args.train, args.limit)
    valid = (
        [as_the_peer_scores(row, model) for row in read(args.valid, DataSpec(train=args.valid))] if args.valid else []
    )
    if args.update == "lora":
        attach_lora(model.hf, LoraShape(rank=args.rank, alpha=2.0 * args.rank, seed=args.seed), head=model.head)

    def valid_loss() -> float | None:
        sums, counts = example_losses(model, valid) if valid else (np.zeros(0), np.zeros(0))
        return float(sums.sum() / counts.sum()) if valid else None

    before = valid_loss()
    source = SftSteps(train, batch=args.batch, epochs=1, budget_tokens=args.budget, world=world, seed=args.seed)
    warm_seconds = warmed(source, model) if world.device.type == "cuda" else 0.0
    rate = args.lr or (2e-4 if args.update == "lora" else 2e-5)
    how = Optimization(learning_rate=rate, warmup=0.0, precision=args.precision)
    reset_peak_memory()
    losses = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for done in fit(model, source, CrossEntropy(), how, Path(folder), world):
            losses.append(round(done.loss, 4))
            seconds = time.perf_counter() - start
            peak = peak_memory_bytes(world.device)
    real = sum(len(example.tokens) for example in train)
    print(
        json.dumps(
            {
                "system": "tunesmith",
                "update": args.update,
                "rows": len(train),
                "real_tokens": real,
                "seconds": round(seconds, 2),
                "compiling_seconds_before": round(warm_seconds, 2),
                "tokens_per_second": round(real / seconds, 1),
                "peak_memory_gb": round(peak / 1e9, 2),
                "losses": losses,
                "valid_loss_before": before,
                "valid_loss_after": valid_loss(),
            }
        )
    )


if __name__ == "__main__":
    main()
