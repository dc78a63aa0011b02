"""`tunesmith doctor`: what this machine can do, and whether what Tunesmith needs is here."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Callable

import torch

from ..errors import TunesmithError
from ..model.builtin import builtin_model, cache_folder
from ..model.linear import AMX, product, products_in
from ..train.meter import machine

PACKAGES = ("torch", "transformers", "safetensors", "datasets", "tokenizers")
DEMO_PACKAGES = ("reporters-db", "courts-db", "simple-icd-10-cm", "botocore")


def examine() -> list[list[str]]:
    """Rows of (what, found, remark)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine(device)
    free = shutil.disk_usage(cache_folder().parent if cache_folder().parent.is_dir() else ".").free
    rows = [
        [
            "device",
            str(facts["device"]),
            f"{facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}",
        ],
        ["memory", f"{float(str(facts['memory_bytes'])) / 1e9:.1f} GB", ""],
        ["disk", f"{free / 1e9:.1f} GB free", "a full fine-tuning checkpoint takes 12 bytes a weight"],
        *_rates(),
    ]
    rows += [[name, *_version(name, needed=True)] for name in PACKAGES]
    rows += [[name, *_version(name, needed=False)] for name in DEMO_PACKAGES]
    try:
        rows.append(["built-in model", "ready", str(builtin_model("smollm2-135m-instruct"))])
    except TunesmithError as error:
        rows.append(["built-in model", "missing", str(error)])
    return rows


def _rates() -> list[list[str]]:
    x, weight = torch.randn(768, 576), torch.randn(1536, 576)
    ours, theirs = _rate(lambda: product(x, weight)), _rate(lambda: x @ weight.T)
    rows = [["float32 products", f"{ours:.0f} GFLOP/s", f"torch's own matmul: {theirs:.0f} GFLOP/s"]]
    if AMX:
        with products_in("bfloat16"):
            rounded = _rate(lambda: product(x, weight))
        rows.append(["bfloat16 products", f"{rounded:.0f} GFLOP/s", "for adapters with lora.precision: bfloat16"])
    return rows


def _rate(call: Callable[[], torch.Tensor]) -> float:
    for _ in range(3):
        call()
    start = time.perf_counter()
    for _ in range(20):
        call()
    return 20 * 2 * 768 * 576 * 1536 / (time.perf_counter() - start) / 1e9


def _version(name: str, *, needed: bool) -> tuple[str, str]:
    try:
        return importlib.metadata.version(name), ""
    except importlib.metadata.PackageNotFoundError:
        return "not installed", "needed" if needed else "only for the demo recipes: pip install tunesmith[demo]"
