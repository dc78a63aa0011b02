"""Low-rank adaptation: y = W x + (alpha / rank) B A x, with W frozen (Hu et al. 2021, arXiv 2106.09685).

The whole layer is one autograd function: no gradient of W is computed, nothing is copied, and the input is kept once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .few_rows import answer, meets_whole
from .linear import Linear, met_as, product, stepped, stepped_


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """Resolved size of an adapter. `target` names linear layers; None means all but the head.

    Blocks before number `lowest` have none; where there are such, layers outside the blocks have none either.
    """

    rank: int
    alpha: float
    target: tuple[str, ...] | None = None
    seed: int = 0
    lowest: int = 0

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank


class _LoraLinear(torch.autograd.Function):
    """dX = dY W + s (dY B) A,  dA = s (dY B)^T X,  dB = s dY^T (X A^T). A and B stay float32 under a bfloat16 W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = product(flat, a)
        y = stepped_(product(flat, weight), steps).addmm_(low, b.T, alpha=scale)
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat, weight, steps, a, b, low)
        ctx.scale = scale
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, steps, a, b, low = ctx.saved_tensors
        gradient = grads[0].reshape(-1, weight.shape[0])
        gradient_low = product(gradient, b.T).mul_(ctx.scale)
        da = product(gradient_low.T, x.T)
        db = product(gradient.T, low.T).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(stepped(gradient, steps), weight.T).addmm_(gradient_low, a)
            dx = dx.view(*grads[0].shape[:-1], weight.shape[1])
        return dx, None, None, None, da.float(), db.float(), None


class LoraLinear(Linear):
    """A frozen Linear with an adapter `lora_a` [rank in], `lora_b` [out rank]. `enabled` False gives the base."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    enabled: bool

    def forward(self, input: Tensor) -> Tensor:
        """W x + scale B A x."""
        if not self.enabled:
            return super().forward(input)
        low_rank = (self.lora_a, self.lora_b, self.scale)
        return _LoraLinear.apply(input, self.weight, self.bias, self.steps, *low_rank)  # type: ignore[return-value]

    @property
    def whole(self) -> Tensor:
        """W + scale B A, in the type that it is multiplied in; W where the adapter is off."""
        if not self.enabled:
            return self.frozen
        update = product(self.lora_b.detach(), self.lora_a.detach().T) * self.scale
        return (self.frozen.float() + update).to(met_as(self.weight))

    def answer(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T N"]:
        """W x + scale B A x, without gradients and without a bias."""
        y = answer(x, self)
        if not self.enabled or meets_whole(x, self):
            return y
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        return y.addmm_(x @ a.T, b.T, alpha=self.scale)


def attach_lora(module: nn.Module, shape: LoraShape, *, head: nn.Module | None = None) -> int:
    """Freeze `module`, give its linear layers adapters in place, and return the number of trainable parameters.

    `head`, the output layer, has none. Raises ModelError when `shape.target` names it, or nothing that there is.
    """
    _refuse_head(module, shape, head)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    total, inside = 0, set(language_model(module).modules())
    for name, child in module.named_modules():
        if not isinstance(child, Linear) or child not in inside or not wanted(name, shape, is_head=child is head):
            continue
        child.__class__ = LoraLinear
        assert isinstance(child, LoraLinear)
        child.lora_a = nn.Parameter(_initial_a(name, child, shape))
        child.lora_b = nn.Parameter(torch.zeros(child.out_features, shape.rank, device=child.weight.device))
        child.scale, child.enabled = shape.scale, True
        total += child.lora_a.numel() + child.lora_b.numel()
    if not total:
        names = linear_names(module, head)
        raise ModelError(
            f"no linear layer is called {', '.join(shape.target)}" if shape.target else "there is no linear layer",
            where="lora.target",
            fix=f"The model has: {', '.join(names)}." if names else "Use update: full for this architecture.",
        )
    return total


def _refuse_head(module: nn.Module, shape: LoraShape, head: nn.Module | None) -> None:
    """Log-probabilities come from the head's own matrix (score.py), which would pass an adapter by."""
    leaf = next((name.rsplit(".", 1)[-1] for name, child in module.named_modules() if child is head), "")
    if leaf in (shape.target or ()):
        what = f"the output layer, {leaf}, takes no adapter"
        raise ModelError(what, where="lora.target", fix=f"Leave {leaf} out of it, or use update: full.")


def language_model(module: nn.Module) -> nn.Module:
    """The part below the output layer that reads text; beside it some models have parts that see or hear."""
    return module.get_decoder() if isinstance(module, PreTrainedModel) else module


def freeze_beside(hf: PreTrainedModel) -> None:
    """Leave what sees or hears as it is: text gives it no gradient."""
    head = hf.get_output_embeddings()
    read = {*language_model(hf).parameters(), *(head.parameters() if head is not None else ())}
    for parameter in hf.parameters():
        if parameter not in read:
            parameter.requires_grad_(False)


def linear_names(module: nn.Module, head: nn.Module | None) -> list[str]:
    """Last parts of the names of the linear layers, the head left out."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, child in module.named_modules()
        if isinstance(child, Linear) and child is not head
    }
    return sorted(names)


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """Adapted layers by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoraLinear)}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The base model inside the `with` block: the reference of RLHF, and the base arm of a comparison."""
    layers = list(lora_layers(module).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def wanted(name: str, shape: LoraShape, *, is_head: bool = False) -> bool:
    """Whether the linear layer of this name gets an adapter."""
    if shape.lowest and (block_of(name) or 0) < shape.lowest:
        return False
    return name.rsplit(".", 1)[-1] in shape.target if shape.target else not is_head


def block_of(name: str) -> int | None:
    """The number of the block that a layer or parameter of this name belongs to; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _initial_a(name: str, layer: Linear, shape: LoraShape) -> Tensor:
    """Uniform in +-1/sqrt(in), as PEFT starts it; a function of the seed and the layer's name alone."""
    digest = hashlib.blake2b(f"{shape.seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.rand(shape.rank, layer.in_features, generator=generator) * (2 * bound) - bound
    return a.to(layer.weight.device)
