"""Many adapters on one base: y = W x + sum of s B A x, all tokens and all adapters in use in three products.

Nothing is merged, so an adapter costs its own few megabytes, comes and goes while others are used, and the base answers
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ModelError
from .few_rows import steady_answer
from .linear import Linear, met_as, steady_product
from .load import Model
from .lora import language_model, wanted
from .peft_layout import Adapter
from .sample import Row


class SharedLinear(Linear):
    """A Linear that several adapters share: `low_rank` holds A [rank in] and s B [out rank] of each.

    `side_by_side` is those in use, one after another, of the widths `ranks`; `others` [tokens ranks] is true where a
    token is not the adapter's, and None if every token is every adapter's.
    """

    low_rank: dict[str, tuple[Tensor, Tensor]]
    ranks: tuple[int, ...] = ()
    side_by_side: tuple[Tensor, Tensor] | None = None
    others: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """W x, plus s B A x where an adapter is meant. Other adapters add zeros, which change no bit. No gradients."""
        x = input.flatten(0, -2)
        y = steady_answer(x, self)
        if self.bias is not None:
            y += self.bias
        if self.side_by_side is not None:
            a, b = self.side_by_side
            low = steady_product(x, a)
            y += steady_product(low if self.others is None else low.masked_fill_(self.others, 0), b)
        return y.view(*input.shape[:-1], -1)

    def use(self, names: Sequence[str]) -> None:
        """Put the adapters of these names side by side."""
        found = [self.low_rank.get(name) for name in names]
        here = [pair for pair in found if pair]
        self.ranks = tuple(len(pair[0]) if pair else 0 for pair in found)
        self.side_by_side = (torch.cat([a for a, _ in here]), torch.cat([b for _, b in here], 1)) if here else None


class Adapters:
    """The adapters on a model's linear layers. Not for two threads at once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: set[str] = set()
        self.used: list[str] = []
        self.layers: dict[str, SharedLinear] = {}
        inside = {*language_model(model.hf).modules(), model.head}
        for name, layer in model.hf.named_modules():
            if type(layer) is Linear and layer in inside:
                layer.__class__ = SharedLinear
                assert isinstance(layer, SharedLinear)
                layer.low_rank = {}
                self.layers[name] = layer

    def check(self, adapter: Adapter) -> None:
        """Raise ModelError unless the adapter fits this base."""
        meant = {name: layer for name, layer in self.layers.items() if wanted(name, adapter.shape)}
        adapter.check(meant)
        if self.model.head in meant.values():
            fix = "Leave the output layer out of lora.target, or serve the run alone with update: full."
            what = "the adapter changes the output layer, which rows share"
            raise ModelError(what, where=str(adapter.folder), fix=fix)
        if not all(bool(part.isfinite().all()) for pair in adapter.pairs.values() for part in pair):
            fix = "Train it again; its rows would spoil the others'."
            raise ModelError("the adapter holds numbers that are not finite", where=str(adapter.folder), fix=fix)

    def add(self, name: str, adapter: Adapter) -> None:
        """Make the adapter known as `name`. Raises ModelError as check does."""
        self.check(adapter)
        self.remove(name)
        self.known.add(name)
        scale = adapter.shape.scale
        for layer, (a, b) in adapter.pairs.items():
            weight = self.layers[layer].weight
            how = {"device": weight.device, "dtype": met_as(weight)}
            self.layers[layer].low_rank[name] = (a.to(**how), (scale * b).to(**how))

    def remove(self, name: str) -> None:
        """Forget an adapter; its rows must have left."""
        self.known.discard(name)
        self.used = []
        for layer in self.layers.values():
            layer.low_rank.pop(name, None)
            layer.use([])

    def route(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """A Route: the next forward pass adds to each row's tokens the adapter that it names; "" is the base.

        Raises KeyError for a name that is not known: the base must not answer in its place.
        """
        for row in rows:
            if row.adapter and row.adapter not in self.known:
                raise KeyError(row.adapter)
        names = sorted({row.adapter for row in rows if row.adapter})
        if names != self.used:
            self.used = names
            for layer in self.layers.values():
                layer.use(names)
        owners = [names.index(row.adapter) if row.adapter else -1 for row in rows]
        tokens = torch.tensor(owners).repeat_interleave(torch.tensor(counts))
        masks: dict[tuple[int, ...], Tensor | None] = {}
        for layer in self.layers.values():
            if layer.ranks not in masks:
                columns = torch.arange(len(names)).repeat_interleave(torch.tensor(layer.ranks, dtype=torch.int64))
                others = (tokens[:, None] != columns).to(self.model.device)
                masks[layer.ranks] = others if len(set(owners)) > 1 else None
            layer.others = masks[layer.ranks]
