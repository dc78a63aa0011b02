"""A scalar head on the model's last hidden state: the reward of an answer, or the value of a state.

It is a submodule of the model, so that checkpoints, optimizer and gradients treat it as any other weight, and it is
taken off again before the model is handed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ModelError
from ..folder import storage_errors
from .load import Model

NAME = "value_head"
FILE = "value_head.safetensors"


def attach_value_head(model: Model, *, seed: int | None = None) -> nn.Linear:
    """Add a trainable scalar head: zero, or drawn with standard deviation 1/sqrt(D + 1) from `seed`.

    The draw follows Ziegler et al. 2019 (arXiv 1909.08593); a value function starts at zero.
    """
    width = int(model.head_weight.shape[1])
    head = nn.Linear(width, 1)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.zero_()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    model.hf.add_module(NAME, head.to(model.device))
    return head


def value_head(module: nn.Module) -> nn.Linear:
    """The scalar head that was attached."""
    head = module.get_submodule(NAME)
    assert isinstance(head, nn.Linear)
    return head


@contextmanager
def without_value_head(model: Model) -> Iterator[None]:
    """Inside the `with` block the plain causal language model, as other programs know it."""
    head = dict(model.hf.named_children()).get(NAME)
    if head is None:
        yield
        return
    delattr(model.hf, NAME)
    try:
        yield
    finally:
        model.hf.add_module(NAME, head)


def save_value_head(head: nn.Linear, folder: Path) -> None:
    """Write the head beside adapter or model."""
    with storage_errors(folder / FILE):
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / FILE
        )


def load_value_head(model: Model, folder: Path) -> None:
    """Attach the head of a reward model. Raises ModelError if there is none or it does not fit."""
    head = attach_value_head(model)
    try:
        head.load_state_dict(load_file(folder / FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        fix = "Name the run folder of a finished run with method: reward."
        raise ModelError(f"no reward head that fits: {first}", where=str(folder), fix=fix) from None


@torch.no_grad()
def normalise(model: Model, mean: float, deviation: float) -> None:
    """Rescale the head so that answers which scored `mean` +- `deviation` score 0 +- 1 (Ziegler et al. 2019)."""
    head = value_head(model.hf)
    head.weight /= deviation
    head.bias.copy_((head.bias - mean) / deviation)
