"""Every bench: the machine's matrix-product rate, then peer and Tunesmith in turn on the same rows.

    make bench                      all
    python bench/run.py even lora   one supervised case
    python bench/run.py dpo grpo    these alignment methods

Writes bench/results/{sft,align}.json and prints the tables of docs/speed.md.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", HERE.parent / ".venv-peer" / "bin" / "python"))
PEER_PACKAGES = ["transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "gguf"]
ROWS, VALID_ROWS = 96, 48
CASES = {"even": "legal_citations", "uneven": "instruct_user252", "instructed": "icd10cm_chapter"}
ALIGN_PAIRS = {"dpo": 32, "reward": 64, "grpo": 64}
GRPO_STEPS = 6


def main() -> None:
    """Run the cases named on the command line, or all."""
    if not SHARED.is_dir():
        print("skipped: the data sets and the peer's script are not beside this checkout")
        return
    wanted = sys.argv[1:]
    work = HERE / "work"
    work.mkdir(exist_ok=True)
    peer_environment()
    model = plain_model()
    aligning = [method for method in ALIGN_PAIRS if not wanted or method in wanted]
    if not set(wanted) & set(ALIGN_PAIRS):
        supervised(model, work, wanted)
    if aligning:
        aligned(model, work, aligning)


def supervised(model: Path, work: Path, wanted: list[str]) -> None:
    """Fine-tuning on examples, LoRA and full: even rows, uneven rows, rows that begin with one long instruction."""
    results = {"gemm_gflops": matrix_rate(), "threads": torch.get_num_threads(), "cases": []}
    for case in CASES:
        train, valid = rows_of(case, work)
        for update in ("lora", "full"):
            if not set(wanted) <= {case, update}:
                continue
            peer = last_json(
                [
                    str(PEER_PYTHON),
                    str(SHARED / "bench" / "peer_trl.py"),
                    "sft",
                    "--model",
                    str(model),
                    "--train",
                    str(train),
                    "--valid",
                    str(valid),
                    "--out",
                    str(work / "peer_out"),
                    *(["--lora"] if update == "lora" else []),
                ]
            )
            ours = last_json(
                [sys.executable, str(HERE / "sft.py"), "--train", str(train), "--valid", str(valid), "--update", update]
            )
            results["cases"].append(
                {"case": case, "update": update, "peer": peer, "ours": ours, "ratios": ratios(peer, ours)}
            )
            print(json.dumps(results["cases"][-1]["ratios"] | {"case": case, "update": update}), flush=True)
    (HERE / "results" / "sft.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def aligned(model: Path, work: Path, methods: list[str]) -> None:
    """DPO, reward model and GRPO with LoRA, on pairs of sentences that people rated."""
    results: dict = {"gemm_gflops": matrix_rate(), "threads": torch.get_num_threads(), "cases": []}
    for method in methods:
        pairs = pairs_of(method, work)
        steps = ["--steps", str(GRPO_STEPS)] if method == "grpo" else []
        out = ["--out", str(work / "peer_out")]
        script = str(SHARED / "bench" / "peer_trl.py")
        command = [str(PEER_PYTHON), script, method, "--model", str(model), "--train", str(pairs), "--lora"]
        peer = last_json(command + steps + out)
        ours = last_json([sys.executable, str(HERE / "align.py"), method, "--train", str(pairs), *steps])
        if method == "grpo":  # the peer counts tokens in another way: compare samples
            peer["samples_per_second"] = round(GRPO_STEPS * 8 / peer["seconds"], 2)
        unit = "samples_per_second" if method == "grpo" else "tokens_per_second"
        found = {
            "speed": round(ours[unit] / peer[unit], 2),
            "memory": round(ours["peak_memory_gb"] / peer["peak_memory_gb"], 2),
        }
        results["cases"].append({"method": method, "unit": unit, "peer": peer, "ours": ours, "ratios": found})
        print(
            f"| {method} | {peer[unit]} | {ours[unit]} {unit.replace('_', ' ')} | {found['speed']} | "
            f"{peer['peak_memory_gb']} | {ours['peak_memory_gb']} | {found['memory']} |",
            flush=True,
        )
    (HERE / "results" / "align.json").write_text(json.dumps(results, indent=1) + "\n")


def pairs_of(method: str, work: Path) -> Path:
    """Pairs of sentences, as a plain prompt/chosen/rejected file."""
    lines = (SHARED / "data" / "sentiment_prefs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: ALIGN_PAIRS[method]]]
    path = work / f"{method}_pairs.jsonl"
    kept = ("prompt",) if method == "grpo" else ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps({key: row[key] for key in kept}) + "\n" for row in rows))
    return path


def matrix_rate() -> dict[str, float]:
    """GFLOP/s of float32 products as torch sends them (MKL) and as Tunesmith does (oneDNN)."""
    from tunesmith.model.linear import product

    x, weight = torch.randn(768, 576), torch.randn(1536, 576)
    rates = {}
    for name, call in (("torch", lambda: x @ weight.T), ("tunesmith", lambda: product(x, weight))):
        for _ in range(5):
            call()
        start = time.perf_counter()
        for _ in range(50):
            call()
        rates[name] = round(50 * 2 * 768 * 576 * 1536 / (time.perf_counter() - start) / 1e9, 1)
    return rates


def rows_of(case: str, work: Path) -> tuple[Path, Path]:
    """96 training rows and 48 validation rows of a case as plain prompt/completion files."""
    folder = SHARED / "data" / CASES[case]
    source = next(path for path in (folder / "train.jsonl.gz", folder / "test.jsonl") if path.exists())
    content = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    plain = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    if case == "even":
        plain = [row for row in plain if "." not in row["parties"].replace(" v. ", " ") and "'" not in row["parties"]]
    elif case == "uneven":
        plain = [row for row in plain if 30 <= len(row["prompt"].split()) + len(row["completion"].split()) <= 220]
    else:
        titles = "\n".join(f"{n}. {title}" for n, title in enumerate(sorted({row["completion"] for row in plain}), 1))
        asked = f"Which ICD-10-CM chapter does this diagnosis belong to? Reply with one of these titles only.\n{titles}"
        plain = [row | {"prompt": f"{asked}\nDiagnosis: {row['prompt']}"} for row in plain[::50]]
    paths = []
    for name, part in (("train", plain[:ROWS]), ("valid", plain[ROWS : ROWS + VALID_ROWS])):
        path = work / f"{case}_{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in part)
        )
        paths.append(path)
    return paths[0], paths[1]


def peer_environment() -> None:
    """Make .venv-peer once."""
    if PEER_PYTHON.exists():
        return
    root = PEER_PYTHON.parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    for packages in (["torch==2.13.0"], PEER_PACKAGES):
        subprocess.run([str(PEER_PYTHON), "-m", "pip", "install", "--quiet", *packages], check=True)


def plain_model() -> Path:
    """The built-in base as a transformers folder."""
    from tunesmith.model.builtin import builtin_model

    folder = builtin_model("smollm2-135m-instruct")
    assert folder is not None
    return folder


def last_json(command: list[str]) -> dict:
    """Run a job and read the JSON line that it prints last."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(peer: dict, ours: dict) -> dict[str, float]:
    """Tunesmith over the peer."""
    return {
        "speed": round(ours["tokens_per_second"] / peer["tokens_per_second"], 2),
        "memory": round(ours["peak_memory_gb"] / peer["peak_memory_gb"], 2),
        "valid_loss_difference": round(ours["valid_loss_after"] - peer["valid_loss_after"], 4),
    }


def print_table(results: dict) -> None:
    """The table of docs/speed.md."""
    print(f"float32 products: {results['gemm_gflops']} GFLOP/s")
    print("| rows | update | TRL tokens/s | ours | speed | TRL GB | ours | memory | valid loss TRL | ours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for c in results["cases"]:
        p, o, r = c["peer"], c["ours"], c["ratios"]
        cells = [c["case"], c["update"], f"{p['tokens_per_second']:.0f}", f"{o['tokens_per_second']:.0f}"]
        cells += [f"{r['speed']:.2f}", f"{p['peak_memory_gb']:.1f}", f"{o['peak_memory_gb']:.1f}", f"{r['memory']:.2f}"]
        print("| " + " | ".join([*cells, f"{p['valid_loss_after']:.4f}", f"{o['valid_loss_after']:.4f}"]) + " |")


if __name__ == "__main__":
    main()
