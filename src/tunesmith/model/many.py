"""Many adapters on one base: y = W x for all tokens in one product, and s B A x for the tokens of each adapter's rows.

Nothing is merged, so an adapter costs its own few megabytes, comes and goes while others are used, and the base answers
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ModelError
from .adapters import Adapter
from .linear import Linear, met_as, steady_product
from .load import Model
from .lora import wanted
from .sample import Row


@dataclass(slots=True)
class _Groups:
    """Which tokens of the stream each adapter is added to; None stands for all of them."""

    now: list[tuple[str, Tensor | None]] = field(default_factory=list)


class SharedLinear(Linear):
    """A Linear that several adapters share: `low_rank` holds A [rank in] and s B [out rank] of each."""

    low_rank: dict[str, tuple[Tensor, Tensor]]
    groups: _Groups

    def forward(self, input: Tensor) -> Tensor:
        """W x, plus s B A x where an adapter is meant; both ways of adding it are plain sums, with the same bits.

        Without gradients.
        """
        x = input.flatten(0, -2)
        y = steady_product(x, self.weight)
        if self.bias is not None:
            y += self.bias
        for name, tokens in self.groups.now:
            if name not in self.low_rank:
                continue
            a, b = self.low_rank[name]
            if tokens is None:
                y.add_(steady_product(steady_product(x, a), b))
            else:
                y.index_add_(0, tokens, steady_product(steady_product(x[tokens], a), b))
        return y.view(*input.shape[:-1], -1)


class Adapters:
    """The adapters on a model's linear layers. Not for two threads at once."""

    def __init__(self, model: Model) -> None:
        self.model, self.groups = model, _Groups()
        self.known: set[str] = set()
        self.layers: dict[str, SharedLinear] = {}
        for name, layer in model.hf.named_modules():
            if type(layer) is Linear:
                layer.__class__ = SharedLinear
                assert isinstance(layer, SharedLinear)
                layer.low_rank, layer.groups = {}, self.groups
                self.layers[name] = layer

    def check(self, adapter: Adapter) -> None:
        """Raise ModelError unless the adapter fits this base."""
        meant = {name: layer for name, layer in self.layers.items() if wanted(name, adapter.shape)}
        adapter.check(meant)
        if self.model.head in meant.values():
            fix = "Leave the output layer out of lora.target, or serve the run alone with update: full."
            what = "the adapter changes the output layer, which rows share"
            raise ModelError(what, where=str(adapter.folder), fix=fix)

    def add(self, name: str, adapter: Adapter) -> None:
        """Make the adapter known as `name`. Raises ModelError as check does."""
        self.check(adapter)
        self.known.add(name)
        scale = adapter.shape.alpha / adapter.shape.rank
        for layer, (a, b) in adapter.pairs.items():
            weight = self.layers[layer].weight
            how = {"device": weight.device, "dtype": met_as(weight)}
            self.layers[layer].low_rank[name] = (a.to(**how), (scale * b).to(**how))

    def remove(self, name: str) -> None:
        """Forget an adapter; its rows must have left."""
        self.known.discard(name)
        for layer in self.layers.values():
            layer.low_rank.pop(name, None)

    def route(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """A Route: the next forward pass adds to each row's tokens the adapter that it names; "" is the base.

        Raises KeyError for a name that is not known: the base must not answer in its place.
        """
        owners: dict[str, list[Tensor]] = {}
        start = 0
        for row, count in zip(rows, counts, strict=True):
            if row.adapter and row.adapter not in self.known:
                raise KeyError(row.adapter)
            owners.setdefault(row.adapter, []).append(torch.arange(start, start + count, device=self.model.device))
            start += count
        alone = len(owners) == 1
        self.groups.now = [(name, None if alone else torch.cat(own)) for name, own in owners.items() if name]
