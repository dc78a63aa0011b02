"""Log-probabilities of chosen tokens, without ever holding [tokens, vocabulary].

The head runs at scored positions only, in tiles that fit a processor's cache or keep a GPU busy. The gradient with
respect to the hidden state is made in the forward pass while the tile is at hand: for log p(t) = z_t - logsumexp(z),
z = W h, it is d log p(t) / dh = W_t - sum_v softmax(z)_v W_v. The backward pass then only scales it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..tensors import Batch, Need, Scores
from .attention import PackedAttention
from .blocks import pick
from .filler import filled, filler
from .kernels import compiled_on_gpu
from .linear import add_product, product, wide_product
from .load import Model
from .values import value_head

TILE = 128
WIDE_TILE = 1024
GPU_TILE_NUMBERS = 2**28
LOG_PROBS: frozenset[Need] = frozenset({"log_probs"})


def score(model: Model, batch: Batch, needs: Set[Need] = LOG_PROBS, temperature: float = 1.0) -> Scores:
    """What `needs` names: log-probability in nats of each target, and the scalar head's value where it is predicted.

    Log-probabilities are of what is drawn from at `temperature`.
    """
    parts: dict[Need, Tensor] = {}
    if not model.packs:
        if "log_probs" in needs:
            parts["log_probs"] = _score_plainly(model, batch, temperature)
        if "values" in needs:
            parts["values"] = _values(model, _hidden_plainly(model, batch))
        return Scores(parts=parts)
    hidden = hidden_states(model, batch)
    if "log_probs" in needs:
        cooled = hidden if temperature == 1 else hidden / temperature  # logits are a product with the hidden state
        parts["log_probs"] = target_log_probs(cooled, model.head_weight, batch.targets)
    if "values" in needs:
        parts["values"] = _values(model, hidden)
    return Scores(parts=parts)


def hidden_states(model: Model, batch: Batch) -> Float[Tensor, "S D"]:
    """Final hidden state at each scored position."""
    if not model.packs:
        return _hidden_plainly(model, batch)
    stream, scored = filled(batch), len(batch.index)
    attend = PackedAttention(stream.layout)
    index = F.pad(batch.index, (0, filler(scored, batch.index.device)))
    if model.blocks and not torch.is_grad_enabled():
        return model.blocks.answer(stream.tokens, stream.positions, attend, index)[:scored]
    if model.blocks and model.blocks.trains:
        return model.blocks.train(stream.tokens, stream.positions, attend, index, stream.states)[:scored]
    hidden = model.body(
        input_ids=stream.tokens[None], position_ids=stream.positions[None], use_cache=False, attend=attend
    ).last_hidden_state[0]
    return pick(hidden, batch.index)


def _values(model: Model, hidden: Float[Tensor, "S D"]) -> Float[Tensor, "S"]:
    return value_head(model.hf)(hidden.float())[:, 0]


def target_log_probs(
    hidden: Float[Tensor, "S D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "S"]
) -> Float[Tensor, "S"]:
    """log softmax(hidden @ weight.T)[targets]."""
    return _TargetLogProbs.apply(hidden, weight, targets)  # type: ignore[return-value]


def all_log_probs(hidden: Float[Tensor, "S D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "S V"]:
    """The whole distribution at each position, for KL and for sampling. No gradient."""
    return torch.log_softmax(wide_product(hidden, weight).float(), dim=-1)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_probs = torch.empty(hidden.shape[0], device=hidden.device)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        wide = weight.to(hidden.dtype)  # once, if it is stored in fewer bits: every tile meets all of it twice
        # On a GPU, where memory is ample and time is not, the gradient of `weight` finds the exponentials again.
        ctx.kept = [] if hidden.is_cuda and ctx.needs_input_grad[1] else None
        for rows in _tiles(hidden, weight, TILE):
            tile, peak, mass = _exponentials(wide_product(hidden[rows], wide), hidden.dtype)
            if ctx.kept is not None:
                ctx.kept.append((rows, tile, mass))
            chosen = wide.index_select(0, targets[rows])
            log_probs[rows] = _dots(hidden[rows], chosen) - peak - mass.log()
            if slope is not None:
                slope[rows] = _less_mean(chosen, product(tile, wide.T), mass)
        ctx.save_for_backward(slope, hidden if weight.requires_grad else None, weight, targets)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, hidden, weight, targets = ctx.saved_tensors
        gradient = grads[0]
        d_hidden = None if slope is None else slope * gradient[:, None].to(slope.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            for rows, tile, mass in ctx.kept or _again(hidden, weight):
                tile = _scaled(tile, -gradient[rows] / mass)
                tile.scatter_add_(1, targets[rows, None], gradient[rows, None].to(tile.dtype))
                if d_weight is None:
                    d_weight = product(tile.T, hidden[rows].T)
                else:
                    add_product(d_weight, tile.T, hidden[rows].T)
        return d_hidden, d_weight, None


def _again(hidden: Float[Tensor, "S D"], weight: Float[Tensor, "V D"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for rows in _tiles(hidden, weight, WIDE_TILE):
        tile, _, mass = _exponentials(wide_product(hidden[rows], weight), weight.dtype)
        yield rows, tile, mass


@compiled_on_gpu
def _scaled(tile: Float[Tensor, "S V"], factor: Float[Tensor, "S"]) -> Float[Tensor, "S V"]:
    return tile.mul_(factor[:, None])


@compiled_on_gpu
def _exponentials(logits: Float[Tensor, "S V"], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - row maximum) as `dtype`, and in float32 the row maximum and the row sum. Uses up `logits`."""
    logits = logits.float()
    peak = logits.amax(-1)
    tile = logits.sub_(peak[:, None]).exp_()
    return tile.to(dtype), peak, tile.sum(-1)


@compiled_on_gpu
def _dots(x: Float[Tensor, "S D"], y: Float[Tensor, "S D"]) -> Float[Tensor, "S"]:
    return (x.float() * y.float()).sum(-1)


@compiled_on_gpu
def _less_mean(chosen: Float[Tensor, "S D"], sums: Float[Tensor, "S D"], mass: Float[Tensor, "S"]) -> Tensor:
    return (chosen - sums / mass[:, None]).to(chosen.dtype)


def _tiles(hidden: Float[Tensor, "S D"], weight: Float[Tensor, "V D"], rows: int) -> list[slice]:
    """At most so many rows at a time; on a GPU as many as make GPU_TILE_NUMBERS logits."""
    total, size = len(hidden), max(rows, GPU_TILE_NUMBERS // len(weight)) if hidden.is_cuda else rows
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _score_plainly(model: Model, batch: Batch, temperature: float) -> Tensor:
    """One segment at a time through the model's own forward: for architectures that cannot be packed."""
    parts = []
    for start, length, mine in _rows_alone(batch):
        logits = model.hf(batch.tokens[None, start : start + length], use_cache=False).logits[0]
        chosen = torch.log_softmax(logits[batch.index[mine] - start].float() / temperature, -1)
        parts.append(chosen.gather(1, batch.targets[mine, None])[:, 0])
    return torch.cat(parts)


def _hidden_plainly(model: Model, batch: Batch) -> Tensor:
    parts = []
    for start, length, mine in _rows_alone(batch):
        out = model.body(input_ids=batch.tokens[None, start : start + length], use_cache=False)
        parts.append(out.last_hidden_state[0].index_select(0, batch.index[mine] - start))
    return torch.cat(parts)


def _rows_alone(batch: Batch) -> list[tuple[int, int, Tensor]]:
    """Start, length and scored places of each segment that stands alone and scores something."""
    rows = []
    for segment, (start, length) in enumerate(zip(batch.layout.starts, batch.layout.lengths, strict=True)):
        mine = (batch.index >= start) & (batch.index < start + length)
        if batch.layout.parents[segment] < 0 and bool(mine.any()):
            rows.append((start, length, mine))
    return rows
