"""A model of 8 B random weights: what a step takes in time and memory, on a CPU exact LoRA within 24 GiB.

    python bench/eight_billion.py --shape 8b --tokens 512 --steps 2
    python bench/eight_billion.py --gpu --tokens 4096 --batch 4 --steps 8 --update full

Writes a bfloat16 checkpoint of llama's shape in shards (16 GB for 8b), trains rank 16 on all linear layers, and deletes
it. The weights are mapped from their files, so resident memory counts pages that the system may drop; what it may not
drop is anonymous: the peak less the pages of files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.memory import numbers_in
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import load, resolve
from tunesmith.model.merge import write_rounded
from tunesmith.pipeline.tune import attach
from tunesmith.recipe import parse_recipe
from tunesmith.screen import Screen
from tunesmith.train.fit import fit
from tunesmith.train.meter import reset_peak_memory
from tunesmith.train.optim import Optimization
from tunesmith.train.plan import derive, flops
from tunesmith.types import Example
from tunesmith.world import world_from_env

# width, width of the gated layer, layers, heads, heads of keys, vocabulary: Llama 3.2 1B and 3B (tied), Llama 3.1 8B
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128_256),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}
SHARD_LAYERS = 4


def main() -> None:
    """Write, train, print one JSON line, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=512, help="of each row")
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--microbatch", type=int, help="tokens; derived unless given")
    parser.add_argument("--profile", help="write what the kernels of the last step took into this file")
    parser.add_argument("--update", choices=["lora", "full"], default="lora")
    parser.add_argument("--gpu", action="store_true", help="end with 1 where there is none")
    parser.add_argument("--weights", default="auto", help="lora.weights")
    parser.add_argument(
        "--eight-bits", action="store_true", help="rounded as by `tunesmith round`, without measuring it"
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="lora.precision")
    parser.add_argument("--recompute", action="store_true", help="whatever the plan says")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="the base whose tokenizer is taken")
    parser.add_argument("--folder", help="where the checkpoint is written, and kept if it is given")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing was measured")
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(args.folder or Path(scratch) / "model")
        if not folder.is_dir():
            write(args.shape, folder, args.tokenizer)
        if args.eight_bits:
            whole, folder = folder, folder.with_name(f"{folder.name}-rounded")
            if not folder.is_dir():
                folder.mkdir()
                write_rounded(whole, folder)
            if not args.folder:
                shutil.rmtree(whole)
        trained(args, folder, Path(scratch))


def write(shape: str, folder: Path, tokenizer: str) -> None:
    """A folder with random weights of the shape, a few layers a file, and another model's tokenizer."""
    width, wide, layers, heads, groups, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape != "8b",
        dtype="bfloat16",
    )
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    needed, free = sum(size.numel() for size in sizes.values()) * 2, shutil.disk_usage(folder.parent).free
    if free < 1.2 * needed:
        raise SystemExit(f"the checkpoint needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free")
    if config.tie_word_embeddings:
        sizes.pop("lm_head.weight", None)
    folder.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for name in sizes:
        layer = int(name.split(".")[2]) // SHARD_LAYERS if ".layers." in name else name.split(".")[-2]
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for file, names in files.items():
        tensors = {name: _random(sizes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in resolve(tokenizer).glob("tokenizer*"):
        shutil.copy(path, folder)


def _random(size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Small normal numbers, or ones for a normalisation, in bfloat16."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    empty = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return empty.normal_(0, 0.02, generator=generator).cpu()


def trained(args: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """Train a few steps and print what they took."""
    how = {"batch": args.batch, "microbatch_tokens": args.microbatch}
    lora = {"rank": 16, "weights": args.weights, "precision": args.precision}
    recipe = parse_recipe({"base": str(folder), "data": {"train": "-"}, "lora": lora, "train": how})
    start, world = time.perf_counter(), world_from_env()
    model = load(recipe.base, world, recipe.weights)
    found: dict[str, object] = {"shape": args.shape, "parameters": model.parameters, "tokens": args.tokens}
    found |= {"update": args.update, "batch": args.batch}
    found |= {"load_seconds": round(time.perf_counter() - start, 1), "loaded_gb": memory()}
    rows = random_rows(args.steps * args.batch, args.tokens)
    settings = derive(recipe, args.update, model, rows)
    Screen().derived(settings.derived)
    attach(recipe, model, settings)
    if model.blocks:
        model.blocks.recompute |= args.recompute
    source = SftSteps(rows, batch=args.batch, epochs=1, budget_tokens=settings.microbatch_tokens, world=world)
    reset_peak_memory()
    optimization = Optimization(learning_rate=settings.learning_rate, warmup=0.0, precision=settings.precision)
    done = []
    watched = torch.profiler.profile() if args.profile else None
    for step in fit(model, source, CrossEntropy(), optimization, scratch / "checkpoints", world):
        print(f"step {step.step}: loss {step.loss:.4f}, {step.tokens_per_second:.2f} tokens/s", flush=True)
        done.append(step)
        if step.step == args.steps:
            break  # before the checkpoint of the last step, which would be as large as the optimizer
        if watched and step.step == args.steps - 1:
            watched.start()
    if watched:
        watched.stop()
        Path(args.profile).write_text(watched.key_averages().table(sort_by="cuda_time_total", row_limit=60))
    rate = statistics.median(step.tokens_per_second for step in done[2:] or done)  # kernels are compiled in the first
    useful = flops(model, args.update, [float(args.tokens)], 1) / args.tokens * rate
    found |= {"tokens_per_second": round(rate, 2), "useful_tflops": round(useful / 1e12, 2), "loss": done[-1].loss}
    found |= {"weights": model.weights.value, "recompute": settings.recompute or args.recompute, "after_gb": memory()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    print(json.dumps(found))


def random_rows(count: int, tokens: int) -> list[Example]:
    """Rows of random tokens, every one trained."""
    draw, weights = np.random.default_rng(0), np.ones(tokens, dtype=np.float32)
    return [Example(tokens=draw.integers(3, 49_000, tokens), weights=weights, id=str(n)) for n in range(count)]


def memory() -> dict[str, float]:
    """Of this process in GB: resident at the peak and now; of that its own, and pages of files."""
    status = Path("/proc/self/status")
    keys = {"peak": "VmHWM:", "resident": "VmRSS:", "anonymous": "RssAnon:", "files": "RssFile:"}
    return {name: round(1024 * sum(numbers_in(status, key)) / 1e9, 2) for name, key in keys.items()}


if __name__ == "__main__":
    main()
