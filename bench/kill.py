"""Kill a run of the real model with SIGKILL at random moments until it has finished, and compare its bits.

    python bench/kill.py lora --kills 8
    python bench/kill.py full --kills 8 --seed 1

The run writes a checkpoint after every step, so that many of the kills fall into the writing of one. What is handed
over and every answer must equal, byte for byte, those of a run that nobody killed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

RECIPE = """
data: {train: builtin:legal_citations, rows: 240, valid: 0.1, test: 0.1}
task: {instructions: "Write it as a Bluebook citation.", shots: 0}
train: {batch: 4, max_steps: 36, evaluations: 2}
evaluate: {rows: 8, valid_rows: 8, forgetting: false}
"""
COMMAND = """
import sys
from tunesmith.cli import main
from tunesmith.train.optim import Optimization
Optimization.__init__.__kwdefaults__["checkpoint_seconds"] = 0.0
main()
"""


def main() -> None:
    """One unbroken run, one that is killed again and again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("update", choices=["lora", "full"])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE)
        command = [sys.executable, "-c", COMMAND, "run", str(recipe), "--quiet", "--set", f"update={args.update}"]
        start = time.monotonic()
        subprocess.run([*command, "--set", f"out={folder}/whole"], check=True)
        whole_seconds = time.monotonic() - start
        moments = []
        while len(moments) < args.kills:
            process = subprocess.Popen([*command, "--set", f"out={folder}/killed"])
            moment = chance.uniform(0.12, 0.28) * whole_seconds
            try:
                process.wait(moment)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found = sorted(Path(folder, "killed").rglob("*.safetensors"))
                moments.append({"seconds": round(moment, 1), "newest": str(found[-1].parent.name) if found else ""})
        subprocess.run([*command, "--set", f"out={folder}/killed"], check=True)
        ours, theirs = (contents(Path(folder, name)) for name in ("whole", "killed"))
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    print(json.dumps({"update": args.update, "kills": moments, "files": len(ours), "differ": differ}))
    sys.exit(1 if differ else 0)


def contents(run: Path) -> dict[str, str]:
    """Hashes of what a run hands over, and of its answers without the seconds that they took."""
    found = {path: path.read_bytes() for kind in ("adapter", "model") for path in run.glob(f"{kind}/*")}
    for path in run.glob("answers/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[path] = json.dumps([{k: v for k, v in line.items() if k != "seconds"} for line in lines]).encode()
    return {str(path.relative_to(run)): sha256(content).hexdigest() for path, content in found.items()}


if __name__ == "__main__":
    main()
