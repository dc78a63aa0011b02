"""A base whose matrices are rounded to 8 bits a number: whole multiples, of at most 127, of a step for each row.

Rounding changes the base, once and for good (`tunesmith round`): what is written is a plain folder in float16 for
whatever opens such folders, so an adapter is trained, judged and served over the same numbers, and the steps beside it.
A step has 4 binary digits and a multiple has 7, so float16, which has 11, holds every number exactly. Read back with
its steps, a matrix takes a byte a number while an adapter is trained over it, on CPU and GPU. Embedding and output
layer stay in 16 bits, as is usual (Dettmers et al. 2022, arXiv 2208.07339).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..errors import ModelError
from .linear import Linear, met_as

STEPS = Path("rounded", "steps.safetensors")  # in a folder of its own: programs read all weights that lie beside others
RECORD = "rounded.json"  # what rounding cost
LARGEST, STEP_DIGITS, SMALLEST_EXPONENT = 127, 4, -24  # 2^-24: float16 holds its multiples
SLICE = 2**20  # numbers worked on at once: they stay in the cache
_AGAIN = "Round its base again with `tunesmith round`."


def rounded(weight: Float[Tensor, "N K"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """The nearest matrix of whole multiples of a step a row, in float16, and the steps."""
    steps = _short(weight.abs().amax(1).float() / LARGEST)
    parts = [torch.round(part.float() / step[:, None]) * step[:, None] for part, step in _slices(weight, steps)]
    return torch.cat([part.half() for part in parts]), steps


def multiples(weight: Float[Tensor, "N K"], steps: Float[Tensor, "N"]) -> Int[Tensor, "N K"] | None:
    """How often each number holds its row's step, in 8 bits; None where one is no whole multiple that they hold."""
    found = []
    for part, step in _slices(weight, steps):
        wide = part.float()
        times = (wide / step[:, None]).round_().clamp_(-LARGEST, LARGEST)
        found.append(times.to(torch.int8))
        if not torch.equal(times.mul_(step[:, None]), wide):
            return None
    return torch.cat(found)


def matrices(folder: Path) -> list[str]:
    """Names of the model's linear layers, the output layer left out. No weight is read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = hf.get_output_embeddings()
    return [name for name, layer in hf.named_modules() if type(layer) is nn.Linear and layer is not head]


def write_steps(folder: Path, steps: dict[str, Tensor], numbers: int) -> None:
    """Keep the steps of each layer, and how many numbers the layers have together."""
    (folder / STEPS).parent.mkdir()
    save_file(steps, folder / STEPS, metadata={"numbers": str(numbers)})


def rounded_numbers(folder: Path) -> int:
    """How many of the folder's numbers can be kept in 8 bits: none unless it was rounded."""
    if not (folder / STEPS).is_file():
        return 0
    try:
        with safe_open(folder / STEPS, framework="pt") as file:
            return int(file.metadata()["numbers"])
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ModelError("damaged", where=str(folder / STEPS), fix=_AGAIN) from error


def keep_in_eight_bits(hf: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Replace the matrices of the rounded `folder` by their multiples and steps, on `device`. Raises ModelError."""
    layers = {name: layer for name, layer in hf.named_modules() if isinstance(layer, Linear)}
    for name, steps in load_file(folder / STEPS).items():
        layer = layers.get(name)
        fits = layer is not None and layer.weight.shape[:1] == steps.shape
        weight = multiples(layer.weight.detach(), steps) if layer and fits else None
        if layer is None or weight is None:
            raise ModelError(f"{name} is not what was rounded to 8 bits", where=str(folder), fix=_AGAIN)
        layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
        layer.steps = steps.to(device, met_as(layer.weight))
    for tensor in {*hf.parameters(), *hf.buffers()} if device.type == "cuda" else ():
        if tensor.dtype == torch.float16:  # a GPU multiplies all in one type
            tensor.data = tensor.data.bfloat16()


def _short(x: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """x, or the next larger number of few binary digits; above 0."""
    quantum = torch.exp2((torch.frexp(x).exponent - STEP_DIGITS).clamp(min=SMALLEST_EXPONENT).float())
    return (x / quantum).ceil().clamp(min=1) * quantum


def _slices(weight: Tensor, steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, with their steps."""
    rows = max(1, SLICE // weight.shape[1])
    return zip(weight.split(rows), steps.split(rows), strict=True)
