"""Answers from the model: batched generation with a key-value cache, on the same weights and numerics as training.

`sample` answers a list of prompts, `serve/engine.py` whoever asks next; both move the same `Live` rows. What all
prompts of a list begin with (a system prompt, instructions, shots) is computed once. Finished rows leave at once and
the next prompts take their place. Greedy at temperature 0; otherwise row i's random numbers depend on (seed, i) alone,
so the order in which rows are batched never changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..tensors import Layout
from ..types import Completion, Stop
from .attention import Attend, PackedAttention
from .linear import product
from .load import Model

PREFILL_TOKENS = 2048
BLOCK_TOKENS = 128  # a cache that grows holds a whole number of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw answers. `batch` rows are decoded at once."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 32


@dataclass(slots=True, eq=False)
class Row:
    """One answer in the making, to `prompt` (what the cache's prefix holds left out).

    `place` chooses its random numbers. Of each token's `alternatives` likeliest rivals, ids and log-probabilities are
    kept in `rivals`. `adapter` means something to who routes (see Route).
    """

    prompt: Int[np.ndarray, "P"]
    how: Sampling
    place: int = 0
    adapter: str = ""
    alternatives: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    rivals: list[list[tuple[int, float]]] = field(default_factory=list)
    uniforms: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = _uniforms(self.how, self.place)


class Cache:
    """Keys and values: a prefix [G P D] common to all rows, and `rows` slots [rows G C D], the active ones first."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Storage of one layer, made on first use in the shape of `like` [G T D]."""
        if layer not in self.slots:
            shape = (self.rows, like.shape[0], self.capacity, like.shape[-1])
            self.slots[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.slots[layer]

    def reserve(self, tokens: int) -> None:
        """Make every slot hold at least `tokens`; doubles, so that it is rarely done."""
        if tokens <= self.capacity:
            return
        self.capacity = -(-max(tokens, 2 * self.capacity) // BLOCK_TOKENS) * BLOCK_TOKENS
        for layer, (keys, values) in list(self.slots.items()):
            del self.slots[layer]
            for new, old in zip(self.layer(layer, keys[0]), (keys, values), strict=True):
                new[:, :, : old.shape[2]] = old

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        for keys, values in self.slots.values():
            keys[target], values[target] = keys[source], values[source]


class _Prefill(PackedAttention):
    """Packed attention that also files each segment's keys and values: in slots `first`..., or as the prefix."""

    def __init__(self, cache: Cache, layout: Layout, first: int | None) -> None:
        super().__init__(layout, cache.prefix.__getitem__ if cache.prefix else None)
        self.cache, self.layout, self.first = cache, layout, first

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend."""
        out = super().__call__(layer, query, key, value, scaling, window)
        if self.first is None:
            self.cache.prefix[layer] = (key.contiguous(), value.contiguous())
            return out
        keys, values = self.cache.layer(layer, key)
        for n, (start, length) in enumerate(zip(self.layout.starts, self.layout.lengths, strict=True)):
            keys[self.first + n, :, :length] = key[:, start : start + length]
            values[self.first + n, :, :length] = value[:, start : start + length]
        return out


class _Decode:
    """One new token for each of the first B slots, which hold `lengths` tokens each."""

    def __init__(self, cache: Cache, lengths: Int[Tensor, "B"]) -> None:
        self.cache, self.lengths = cache, lengths
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.longest = int(lengths.max()) + 1
        self.unused = torch.arange(self.longest, device=lengths.device)[None] > lengths[:, None]
        self.bias = torch.zeros(self.unused.shape, device=lengths.device).masked_fill_(self.unused, float("-inf"))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See Attend. Query heads that share keys are one matrix product."""
        rows, groups = len(self.rows), key.shape[0]
        keys, values = self.cache.layer(layer, key)
        keys[self.rows, :, self.lengths] = key.transpose(0, 1)
        values[self.rows, :, self.lengths] = value.transpose(0, 1)
        keys, values = keys[:rows, :, : self.longest], values[:rows, :, : self.longest]
        q = query.transpose(0, 1).reshape(rows, groups, -1, query.shape[-1])
        before_keys, before_values = self.cache.prefix.get(layer, (None, None))
        if before_keys is None or before_values is None:
            bias = self._windowed(self.bias[:, None, None], 0, window).to(q.dtype)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scaling)
            return out.flatten(1, 2).transpose(0, 1)
        q = q * scaling
        logits = (q @ keys.transpose(-1, -2)).masked_fill_(self.unused[:, None, None], float("-inf"))
        length = before_keys.shape[1]
        flat = q.transpose(0, 1).flatten(1, 2)
        before = (flat @ before_keys.transpose(-1, -2)).unflatten(1, (rows, -1)).transpose(0, 1)
        weights = torch.softmax(self._windowed(torch.cat([before, logits], -1), length, window), -1)
        over_prefix = weights[..., :length].transpose(0, 1).flatten(1, 2) @ before_values
        out = over_prefix.unflatten(1, (rows, -1)).transpose(0, 1) + weights[..., length:] @ values
        return out.flatten(1, 2).transpose(0, 1)

    def _windowed(self, logits: Tensor, prefix: int, window: int | None) -> Tensor:
        if window is None or prefix + self.longest <= window:
            return logits
        place = torch.arange(logits.shape[-1], device=logits.device)
        far = place[None] <= (prefix + self.lengths - window)[:, None]
        return logits.masked_fill(far[:, None, None], float("-inf"))


Decode = Callable[[Cache, Tensor], Attend]
Multiply = Callable[[Tensor, Tensor], Tensor]
Route = Callable[[Sequence[Row], Sequence[int]], None]


def _one_model(rows: Sequence[Row], counts: Sequence[int]) -> None:
    """The Route of a model that answers every row."""


class Live:
    """Rows that are answered side by side: `admit` begins some, `advance` draws a token for each, `leave` frees a slot.

    `route` hears before each forward pass which rows are in the stream, and how many of its tokens are each one's.
    `decode` is how the rows' last tokens attend, `multiply` the product with the output layer.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        capacity: int,
        route: Route = _one_model,
        decode: Decode = _Decode,
        multiply: Multiply = product,
    ) -> None:
        self.model, self.route, self.decode, self.multiply = model, route, decode, multiply
        self.cache = Cache(slots, capacity)
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.shared = 0

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self.cache.rows - len(self.rows)

    @torch.no_grad()
    def share(self, prefix: Int[np.ndarray, "P"]) -> None:
        """Compute what every later prompt continues. Only before the first `admit`."""
        self.shared = len(prefix)
        _forward(self.model, prefix, np.arange(self.shared), _Prefill(self.cache, _alone([self.shared]), None))

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Prefill the rows' prompts, one stream for all, draw their first tokens, and return the rows."""
        counts = [len(row.prompt) for row in rows]
        self.cache.reserve(max(counts))
        layout = _alone(counts)
        positions = np.concatenate([np.arange(self.shared, self.shared + count) for count in counts])
        self.route(rows, counts)
        prefill = _Prefill(self.cache, layout, len(self.rows))
        hidden = _forward(self.model, np.concatenate([row.prompt for row in rows]), positions, prefill)
        ends = torch.tensor(np.cumsum(counts) - 1, device=hidden.device)
        self.rows += rows
        self.lengths += counts
        _draw(self.multiply(hidden[ends], self.model.head_weight).float(), rows)
        return rows

    @torch.no_grad()
    def advance(self) -> Sequence[Row]:
        """Feed each row its last token, draw the next, and return the rows."""
        tokens = np.array([row.tokens[-1] for row in self.rows])
        held = torch.tensor(self.lengths, device=self.model.device)
        self.cache.reserve(max(self.lengths) + 1)
        self.route(self.rows, [1] * len(self.rows))
        hidden = _forward(self.model, tokens, np.array(self.lengths) + self.shared, self.decode(self.cache, held))
        self.lengths = [length + 1 for length in self.lengths]
        _draw(self.multiply(hidden, self.model.head_weight).float(), self.rows)
        return list(self.rows)

    def leave(self, row: Row) -> None:
        """Free the row's slot by moving the last row into it."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            self.cache.move(last, place)
            self.rows[place], self.lengths[place] = self.rows[last], self.lengths[last]
        self.rows.pop()
        self.lengths.pop()


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[Int[np.ndarray, "_"]],
    how: Sampling,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One Completion for each prompt, in order. `progress` is told how many are finished."""
    if not model.packs:
        return [_sample_plainly(model, prompt, how, place) for place, prompt in enumerate(prompts)]
    shared = _shared_prefix(prompts)
    longest = max((len(prompt) - shared for prompt in prompts), default=0)
    live = Live(model, min(how.batch, len(prompts)), longest + how.max_new_tokens)
    if shared:
        live.share(prompts[0][:shared])
    finished: list[Completion | None] = [None] * len(prompts)
    waiting = [Row(prompt[shared:], how, place) for place, prompt in enumerate(prompts)]
    while waiting or live.rows:
        if waiting and (live.free >= max(1, live.cache.rows // 4) or not live.rows):
            count = how_many(waiting, live.free)
            new = live.admit(waiting[:count])
            del waiting[:count]
        else:
            new = live.advance()
        for row in new:
            stop = stopped(row, model)
            if stop:
                finished[row.place] = _completion(row, stop, model)
                live.leave(row)
                progress(len(prompts) - finished.count(None))
    return [completion for completion in finished if completion is not None]


def how_many(waiting: Sequence[Row], free: int) -> int:
    """How many of the first waiting rows to admit together: at least one, and no more tokens than PREFILL_TOKENS."""
    sizes = np.cumsum([len(row.prompt) for row in waiting[:free]])
    return max(1, int((sizes <= PREFILL_TOKENS).sum()))


def _forward(model: Model, tokens: np.ndarray, positions: np.ndarray, attend: Attend) -> Tensor:
    if model.blocks:
        places = torch.as_tensor(positions).to(model.device)
        return model.blocks.answer(torch.as_tensor(tokens).to(model.device), places, attend)
    out = model.body(
        input_ids=torch.as_tensor(tokens, device=model.device)[None],
        position_ids=torch.as_tensor(positions, device=model.device)[None],
        use_cache=False,
        attend=attend,
    )
    return out.last_hidden_state[0]


def _draw(logits: Float[Tensor, "B V"], rows: Sequence[Row]) -> None:
    """Append one token, its log-probability and its rivals to each row."""
    scores = torch.log_softmax(logits, -1)  # not logsumexp, which adds up one row in another order than several
    chosen = logits.argmax(-1)
    warm = [n for n, row in enumerate(rows) if row.how.temperature > 0]
    if warm:
        dials = [(row.how.temperature, row.how.top_p, row.uniforms[len(row.tokens)]) for row in (rows[n] for n in warm)]
        temperature, top_p, draws = torch.tensor(np.array(dials, dtype=np.float32), device=logits.device).T
        likely = torch.softmax(logits[warm] / temperature[:, None], -1)
        chosen[warm] = _inverse_cdf(likely, draws, top_p[:, None])
    log_probs = scores.gather(1, chosen[:, None])[:, 0]
    for row, token, log_prob in zip(rows, chosen.tolist(), log_probs.tolist(), strict=True):
        row.tokens.append(token)
        row.log_probs.append(log_prob)
    for n, row in enumerate(rows):
        if row.alternatives:
            most = scores[n].topk(row.alternatives)
            row.rivals.append(list(zip(most.indices.tolist(), most.values.tolist(), strict=True)))


def _inverse_cdf(
    probabilities: Float[Tensor, "B V"], draws: Float[Tensor, "B"], top_p: float | Float[Tensor, "B 1"]
) -> Int[Tensor, "B"]:
    """Tokens at the quantiles `draws` of the nucleus: the most likely tokens that hold `top_p` of the mass."""
    dials = torch.as_tensor(top_p, device=draws.device).expand(len(draws), 1)
    cut = dials[:, 0] < 1
    nucleus = dials[cut].clamp_min(torch.finfo(torch.float32).tiny)  # the likeliest token is always in it
    chosen = _at_quantile(probabilities, draws)  # of all tokens any order will do, and sorting them takes long
    if bool(cut.any()):
        ordered, tokens = probabilities[cut].sort(dim=-1, descending=True, stable=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < nucleus, ordered, 0.0)
        chosen[cut] = tokens.gather(1, _at_quantile(ordered, draws[cut])[:, None])[:, 0]
    return chosen


def _at_quantile(masses: Float[Tensor, "B V"], draws: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The first place up to which more than a share `draws` of the mass lies; its own mass is never 0."""
    sums = masses.cumsum(-1)
    total = sums[:, -1:]
    wanted = torch.minimum(draws[:, None] * total, total.nextafter(torch.zeros_like(total)))
    # Nothing is likely where probabilities are NaN; whoever reads the log-probability will see it.
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp_(max=masses.shape[-1] - 1)


def _uniforms(how: Sampling, place: int) -> np.ndarray:
    if how.temperature == 0:
        return np.empty(0, dtype=np.float32)
    key = np.array([how.seed % 2**64, place], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(how.max_new_tokens, dtype=np.float32)


def stopped(row: Row, model: Model) -> Stop | None:
    """Why the row ends with its last token, if it does."""
    if row.tokens[-1] in model.eos_ids:
        return "end_of_turn"
    return "length" if len(row.tokens) >= row.how.max_new_tokens else None


def _completion(row: Row, stop: Stop, model: Model) -> Completion:
    shown = row.tokens[:-1] if stop == "end_of_turn" else row.tokens
    return Completion(
        tokens=np.array(row.tokens, dtype=np.int64),
        log_probs=np.array(row.log_probs, dtype=np.float32),
        text=str(model.tokenizer.decode(shown, skip_special_tokens=True)),
        stop=stop,
    )


def _shared_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, short of the last of the shortest."""
    if len(prompts) < 2:
        return 0
    shared = min(len(prompt) for prompt in prompts) - 1
    for prompt in prompts[1:]:
        differs = np.flatnonzero(prompts[0][:shared] != prompt[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


def _alone(lengths: list[int]) -> Layout:
    return Layout(lengths=tuple(lengths), parents=(-1,) * len(lengths))


def _sample_plainly(model: Model, prompt: np.ndarray, how: Sampling, place: int) -> Completion:
    """Recompute the whole row for each token: for architectures that cannot be packed."""
    row = Row(prompt, how, place)
    while True:
        tokens = torch.as_tensor([*prompt.tolist(), *row.tokens], device=model.device)[None]
        _draw(model.hf(tokens, use_cache=False).logits[0, -1:].float(), [row])
        stop = stopped(row, model)
        if stop:
            return _completion(row, stop, model)
