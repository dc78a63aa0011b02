"""How a run grows with its rows: seconds from start to first optimizer step, tokens a second, peak memory.

    python bench/rows.py 1000 10000 100000

For each number, rows of made-up words (10 to 40 of them, answers of 3 to 8) are written to a file and `tunesmith run`
is started on it for `--steps` steps, in a process of its own, and once more, when rows and tokens are found in the
cache as they were prepared before. One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RECIPE = """
base: smollm2-135m-instruct
data: {{train: {rows}, valid: {held}, test: {held}, rehearse: 0}}
task: {{metric: completion_loss, max_new_tokens: 16, shots: 0}}
method: sft
update: lora
lora: {{rank: 16}}
train: {{max_steps: {steps}, batch: 16, epochs: 1, evaluations: 1}}
evaluate: {{rows: 16, valid_rows: 16, forgetting: false}}
out: {out}
"""


def main() -> None:
    """Run each size, smallest first: peak memory is that of the largest child so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    for count in sorted(args.rows):
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            print(json.dumps(measured(count, args.steps, Path(scratch))), flush=True)


def measured(count: int, steps: int, scratch: Path) -> dict[str, float]:
    """One run to its end, and one more over the same rows to its first step."""
    rows, out = scratch / "rows.jsonl", scratch / "run"
    write(rows, count)
    first, seconds = run(rows, 64 / count, steps, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    again, _ = run(rows, 64 / count, steps, scratch / "again", whole=False)
    return {
        "rows": count,
        "first_step_seconds": round(first, 2),
        "first_step_warm_seconds": round(again, 2),
        "tokens_per_second": round(float(np.median(rates)), 1),
        "peak_memory_gb": round(peak / 1e6, 3),
        "seconds": round(seconds, 1),
    }


def run(rows: Path, held: float, steps: int, out: Path, *, whole: bool = True) -> tuple[float, float]:
    """Seconds to the first optimizer step, and to the end, or to when it was stopped after that step."""
    recipe, metrics = out.with_suffix(".yaml"), out / "metrics.jsonl"
    text = RECIPE.format(rows=rows.resolve(), held=held, steps=steps, out=out.resolve())
    recipe.write_text(text, encoding="utf-8")
    start, first = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-m", "tunesmith.cli", "run", str(recipe), "--quiet"])
    while process.poll() is None:
        if not first and metrics.is_file() and metrics.stat().st_size:
            first = time.perf_counter() - start
            if not whole:
                process.kill()
        time.sleep(0.05)
    assert process.returncode == 0 or not whole
    return first, time.perf_counter() - start


def write(path: Path, count: int) -> None:
    """Rows that differ from each other."""
    draw = random.Random(0)
    words = [
        a + b + c for a in "bcdfgklmnprst" for b in ("a", "e", "i", "o", "ea", "ou") for c in ("n", "r", "st", "ck")
    ]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"Ticket {number:07}: {' '.join(draw.choices(words, k=draw.randint(10, 40)))}"
            answer = " ".join(draw.choices(words, k=draw.randint(3, 8)))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


if __name__ == "__main__":
    main()
