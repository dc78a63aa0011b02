"""The forward pass of models made of llama's blocks, for training and for answers, without their modules' ceremony.

With gradients a block is two halves with hand-written backward passes (sides.py) and attention between them; without,
the same sums and nothing kept. A model goes this way only if its blocks hold exactly what is known here and a probe at
loading gives the hidden states of its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .attention import Attend
from .few_rows import answer
from .fused import GatedMlp, RmsNorm
from .linear import Linear, met_as
from .lora import LoraLinear
from .sides import Dense, gated, into_attention, out_of_attention

_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer: x += o(attention(norm(x))), x += down(silu(gate(norm(x))) * up(norm(x)))."""

    norm: RmsNorm
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    head_size: int
    scaling: float
    norm_again: RmsNorm
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The matrices."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    @property
    def plain(self) -> bool:
        """Whether every layer is a matrix, with or without one adapter, and nothing else."""
        return all(type(layer) in (Linear, LoraLinear) and layer.bias is None for layer in self.layers)

    @property
    def trained(self) -> bool:
        """Whether training changes anything in it."""
        parts = (self.norm, self.norm_again, *self.layers)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())


@dataclass(slots=True, kw_only=True, eq=False)
class Blocks:
    """The parts of a model below its output layer. They are the model's own modules, adapters included.

    `recompute` says whether training keeps only what goes into each block and computes the rest again, with the same
    gradients, when they are taken (Chen et al. 2016, arXiv 1604.06174).
    """

    embed: nn.Module
    rotary: nn.Module
    blocks: tuple[Block, ...]
    norm: RmsNorm
    recompute: bool = False

    @property
    def trains(self) -> bool:
        """Whether `train` knows every layer, and all is of one type outside matrices."""
        return self.norm.weight.dtype == met_as(self.norm.weight) and all(block.plain for block in self.blocks)

    @property
    def frozen(self) -> int:
        """How many blocks, from the first, training does not change."""
        if any(parameter.requires_grad for parameter in self.embed.parameters()):
            return 0
        return next((place for place, block in enumerate(self.blocks) if block.trained), len(self.blocks))

    @property
    def cache_bytes(self) -> int:
        """What keys and values of a token take in all blocks."""
        weights = [layer.weight for block in self.blocks for layer in (block.k, block.v)]
        return sum(int(weight.shape[0]) * met_as(weight).itemsize for weight in weights)  # type: ignore[union-attr]

    def step_bytes(self, tokens: int) -> int:
        """What a stream takes at its peak in training: kept for the gradients, and a block at work."""
        first = self.blocks[0]
        width, inner = first.norm.weight.numel(), first.o.weight.shape[1]  # type: ignore[union-attr]
        wide = first.gate.weight.shape[0]  # type: ignore[union-attr]
        block = 2 * width + 5 * inner + 2 * wide  # two inputs; q, k, v, seen before and after turning; gate, up
        kept = len(self.blocks) * width + block if self.recompute else len(self.blocks) * block
        return met_as(first.norm.weight).itemsize * tokens * int(kept + block)

    def train(
        self,
        tokens: Int[Tensor, "T"],
        positions: Int[Tensor, "T"],
        attend: Attend,
        index: Int[Tensor, "S"],
        states: Float[Tensor, "T D"] | None = None,
    ) -> Float[Tensor, "S D"]:
        """Final hidden states at some places of a stream, with gradients from the first trained block on.

        `states` are what comes before it, if that is known.
        """
        first = self.frozen
        below = self.below(first, tokens, positions, attend) if first and states is None else states
        x: Tensor = self.embed(tokens) if below is None else below.to(self.norm.weight.dtype)
        turn = self.turn(x, positions)
        for layer, block in enumerate(self.blocks[first:], start=first):
            ends = index if block is self.blocks[-1] else None  # nobody looks at the other places again
            if self.recompute:
                again = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(_through, x, layer, block, turn, attend, ends, **again)  # type: ignore[assignment]
            else:
                x = _through(x, layer, block, turn, attend, ends)
        return self.norm(x)

    @torch.no_grad()
    def answer(
        self,
        tokens: Int[Tensor, "T"],
        positions: Int[Tensor, "T"],
        attend: Attend,
        index: Int[Tensor, "S"] | None = None,
    ) -> Float[Tensor, "S D"]:
        """Final hidden states at some or all places of a stream, without gradients."""
        return _rms_norm(self.below(len(self.blocks), tokens, positions, attend, index), self.norm)

    @torch.no_grad()
    def below(
        self,
        block_number: int,
        tokens: Int[Tensor, "T"],
        positions: Int[Tensor, "T"],
        attend: Attend,
        index: Int[Tensor, "S"] | None = None,
    ) -> Float[Tensor, "S D"]:
        """What comes into a block at each place of a stream, without gradients; out of the last at some places."""
        x = self.embed(tokens)
        cos, sin = self.turn(x, positions)
        half = sin.shape[-1] // 2
        for layer, block in enumerate(self.blocks[:block_number]):
            normal = _rms_norm(x, block.norm)
            query, key, value = (
                linear(part, normal).unflatten(-1, (-1, block.head_size)) for part in (block.q, block.k, block.v)
            )
            heads = query.shape[1]
            turned = torch.cat([query, key], 1)
            turned = (turned * cos).addcmul_(turned.roll(half, -1), sin).transpose(0, 1)
            seen = attend(layer, turned[:heads], turned[heads:], value.transpose(0, 1), block.scaling, None)
            seen = seen.transpose(0, 1).flatten(1)
            if index is not None and block is self.blocks[-1]:
                x, seen = pick(x, index), pick(seen, index)
            x = x.add_(linear(block.o, seen))
            normal = _rms_norm(x, block.norm_again)
            x.add_(linear(block.down, F.silu(linear(block.gate, normal)).mul_(linear(block.up, normal))))
        return x

    def turn(self, x: Float[Tensor, "T D"], positions: Int[Tensor, "T"]) -> tuple[Tensor, Tensor]:
        """cos and sin [T 1 d] of the rotary embedding, the first half of sin negative."""
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)


def pick(x: Float[Tensor, "T D"], index: Int[Tensor, "S"]) -> Float[Tensor, "S D"]:
    """Rows of x. Not index_select, whose gradient is scattered number by number."""
    return F.embedding(index, x)


def blocks_of(hf: PreTrainedModel) -> Blocks | None:
    """The parts of `hf` if it is made of nothing but llama's blocks (by what its modules hold), else None."""
    config, body = hf.config.to_dict(), hf.base_model
    if set(dict(body.named_children())) != _MODEL:
        return None
    if config.get("use_sliding_window", True) and config.get("sliding_window"):
        return None
    blocks = [_block(layer) for layer in body.get_submodule("layers").children()]
    norm = body.get_submodule("norm")
    if not isinstance(norm, RmsNorm) or any(block is None for block in blocks):
        return None
    embed, rotary = body.get_submodule("embed_tokens"), body.get_submodule("rotary_emb")
    return Blocks(embed=embed, rotary=rotary, blocks=tuple(b for b in blocks if b is not None), norm=norm)


def _block(layer: nn.Module) -> Block | None:
    parts = dict(layer.named_children())
    if set(parts) != _LAYER or set(dict(parts["self_attn"].named_children())) != _ATTENTION:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    norm, norm_again = parts["input_layernorm"], parts["post_attention_layernorm"]
    linear = {name: attention.get_submodule(name) for name in _ATTENTION}
    if not (isinstance(norm, RmsNorm) and isinstance(norm_again, RmsNorm) and isinstance(mlp, GatedMlp)):
        return None
    size, scaling = vars(attention).get("head_dim"), vars(attention).get("scaling")
    if size is None or scaling is None:
        return None
    return Block(
        norm=norm,
        q=linear["q_proj"],
        k=linear["k_proj"],
        v=linear["v_proj"],
        o=linear["o_proj"],
        head_size=int(size),
        scaling=float(scaling),
        norm_again=norm_again,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def _through(
    x: Float[Tensor, "T D"],
    layer: int,
    block: Block,
    turn: tuple[Tensor, Tensor],
    attend: Attend,
    index: Int[Tensor, "S"] | None,
) -> Float[Tensor, "S D"]:
    """What the block numbered `layer` makes of x, at some or all places, with gradients."""
    inward = [_dense(part) for part in (block.q, block.k, block.v)]
    heads = into_attention(x, block.norm.weight, block.norm.variance_epsilon, turn, inward)
    query, key, value = (part.transpose(0, 1) for part in heads)
    seen = attend(layer, query, key, value, block.scaling, None).transpose(0, 1).flatten(1)
    if index is not None:
        x, seen = pick(x, index), pick(seen, index)
    x = out_of_attention(x, seen, _dense(block.o))
    wide = [_dense(part) for part in (block.gate, block.up, block.down)]
    return gated(x, block.norm_again.weight, block.norm_again.variance_epsilon, wide)


def _dense(module: nn.Module) -> Dense:
    """A layer that is `Block.plain`."""
    assert isinstance(module, Linear)
    if isinstance(module, LoraLinear) and module.enabled:
        return Dense(module.weight, module.steps, module.lora_a, module.lora_b, module.scale)
    return Dense(module.weight, module.steps, None, None, 0.0)


def linear(module: nn.Module, x: Float[Tensor, "T K"]) -> Float[Tensor, "T N"]:
    """A layer without going through its module, where it is one of ours without a bias."""
    if type(module) is Linear and module.bias is None:
        return answer(x, module)
    if type(module) is LoraLinear and module.bias is None:
        return module.answer(x)
    return module(x)


def _rms_norm(x: Float[Tensor, "T D"], norm: RmsNorm) -> Float[Tensor, "T D"]:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
