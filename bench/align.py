"""Our side of the comparison with TRL for the methods that align: dpo, reward, grpo; one JSON line.

    python bench/align.py dpo --train pairs.jsonl

The same job as the peer's script: batches of 8 rows (grpo: one prompt, 8 answers a step), one epoch or `--steps`, rank
16 on all linear layers, alpha 32. Tokens are real tokens of the rows; a pair counts its prompt twice, as with the peer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.data.read import read
from tunesmith.methods.annotate import Group, annotate
from tunesmith.methods.dpo import PreferenceLoss
from tunesmith.methods.grpo import GrpoLoss, grpo_examples
from tunesmith.methods.order import EpochSteps
from tunesmith.methods.reward import BradleyTerry, at_the_end, read_there
from tunesmith.methods.rollout import Answer, RolloutPlan, RolloutSteps
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora
from tunesmith.model.sample import Sampling
from tunesmith.model.values import attach_value_head
from tunesmith.pipeline.pairs import pair
from tunesmith.recipe import DataSpec
from tunesmith.tensors import Loss, StepSource
from tunesmith.train.fit import fit
from tunesmith.train.meter import peak_memory_bytes, reset_peak_memory
from tunesmith.train.optim import Optimization
from tunesmith.types import Comparison, Item, Message
from tunesmith.world import world_from_env

BATCH, GROUP = 8, 8


def main() -> None:
    """Train once and print what it took; the reference's log-probabilities are part of the time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["dpo", "reward", "grpo"])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--train", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=BATCH, help="pairs, or answers in groups of 8, a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=int, default=2048, help="tokens in one forward pass")
    args = parser.parse_args()
    world = world_from_env()
    model = load(args.base, world)
    attach_lora(model.hf, LoraShape(rank=args.rank, alpha=2.0 * args.rank), head=model.head)
    how = Optimization(learning_rate=1e-6 if args.method == "grpo" else 2e-4, warmup=0.0)
    reset_peak_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source, loss = job(args, model, Path(folder))
        losses, ends = [], []
        for done in fit(model, source, loss, how, Path(folder) / "steps", world):
            losses.append(done.loss)
            ends.append(time.perf_counter())
        seconds = time.perf_counter() - start
        peak = peak_memory_bytes(world.device)
    real = args.steps * args.batch if args.method == "grpo" else real_tokens(source)
    unit = "samples" if args.method == "grpo" else "tokens"
    line = {"system": "tunesmith", "method": args.method, f"real_{unit}": real, "seconds": round(seconds, 2)}
    rate = {f"{unit}_per_second": round(real / seconds, 2)}
    if len(ends) > 3:  # without what is done once: kernels compiled, memory taken
        steady = (ends[-1] - ends[1]) / (len(ends) - 2) * len(ends)
        rate |= {f"steady_{unit}_per_second": round(real / steady, 2)}
    rate |= {"peak_memory_gb": round(peak / 1e9, 2)}
    print(json.dumps(line | rate | {"losses": [round(loss, 4) for loss in losses]}))


def job(args: argparse.Namespace, model: Model, folder: Path) -> tuple[StepSource, Loss]:
    """Where batches come from, and the loss."""
    if args.method == "grpo":
        return rollouts(args, model, folder), GrpoLoss()
    rows = [row for row in read(args.train, DataSpec(train=args.train, rows=args.limit)) if isinstance(row, Comparison)]
    groups = [pair(row, model.vocabulary) for row in rows]
    if args.method == "reward":
        attach_value_head(model, seed=0)
        ended = [tuple(at_the_end(example) for example in group) for group in groups]
        return steps(ended, args, finish=read_there), BradleyTerry()
    with adapters_off(model.hf):
        groups = annotate(model, groups, {"log_probs": "reference"}, budget_tokens=args.budget)
    return steps(groups, args), PreferenceLoss()


def steps(groups: Sequence[Group], args: argparse.Namespace, finish=lambda batch: batch) -> EpochSteps:
    """One epoch of pairs."""
    world = world_from_env()
    return EpochSteps(groups, batch=args.batch, epochs=1, budget_tokens=args.budget, world=world, finish=finish)


def rollouts(args: argparse.Namespace, model: Model, folder: Path) -> RolloutSteps:
    """Prompts with 8 answers each, scored by their length as the peer's script does."""
    lines = [json.loads(line) for line in Path(args.train).read_text(encoding="utf-8").splitlines()]
    turns = [(Message(role="user", content=line["prompt"]),) for line in lines]
    asked = [Item(prompt=prompt, reference="", id=str(n)) for n, prompt in enumerate(turns)]

    def brevity(answers: Sequence[Answer]) -> list[float]:
        return [-abs(len(answer.completion.text) - 80) / 80 for answer in answers]

    def shape(groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]):
        return grpo_examples(groups, scores, "grpo")[0], {}

    plan = RolloutPlan(
        rollouts=args.steps,
        prompts=args.batch // GROUP,
        group=GROUP,
        epochs=1,
        batch=args.batch,
        budget_tokens=args.budget,
        missing_end=0.0,
        seed=0,
    )
    drawing = Sampling(max_new_tokens=args.new_tokens, temperature=1.0, batch=64)
    return RolloutSteps(model, asked, drawing, plan, brevity, shape, folder / "rollouts")


def real_tokens(source: StepSource) -> int:
    """Tokens of both answers of every pair, prompt included."""
    assert isinstance(source, EpochSteps)
    return sum(len(example.tokens) for group in source.groups for example in group)


if __name__ == "__main__":
    main()
