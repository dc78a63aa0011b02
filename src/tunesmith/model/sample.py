"""Answers from the model: batched generation with a key-value cache, on the same weights and numerics as training.

`sample` answers a list of prompts, `serve/engine.py` whoever asks next; both move the same `Live` rows. What all
prompts of a list begin with (a system prompt, instructions, shots) is computed once. Finished rows leave at once and
the next prompts take their place. Greedy at temperature 0; otherwise row i's random numbers depend on (seed, i) alone,
so the order in which rows are batched never changes what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..memory import available_bytes
from ..tensors import Layout
from ..types import Completion, Stop
from .attention import Attend
from .cache import Cache, Decode, Prefill
from .few_rows import kept_twice, wide_answer
from .filler import filler, with_filler
from .guesses import Guesses
from .load import Model
from .recorded import Recordings, records

PREFILL_TOKENS = 2048
MANY_PASSES = 32  # matrices are copied, and code is compiled, in as long as some 20 save
HALVE_FROM_PASSES, HALVE_UP_TO_ROWS = 96, 4  # and halved in as long as some 50 save
RECORD_FROM_PASSES = 16
GPU_BATCH = 256
COMPILED_KEYS = 16_384  # over as many threads: with more to look at, PyTorch's passes are faster than compiled ones
CHEAP_TOKENS, MOST_GUESSES = 8, 3  # up to so many tokens a pass one more costs little; guesses a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw answers. `batch` rows are decoded at once."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch: int = 32


class Token(NamedTuple):
    """A token that was drawn, its log-probability, and its likeliest rivals."""

    id: int
    log_prob: float
    rivals: list[tuple[int, float]]


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

    def take(self, token: Token) -> None:
        """Say one more token."""
        self.tokens.append(token.id)
        self.log_probs.append(token.log_prob)
        if self.alternatives:
            self.rivals.append(token.rivals)


Decoding = Callable[[Cache, Tensor, Tensor], Attend]
Multiply = Callable[[Tensor, nn.Linear], Tensor]
Route = Callable[[Sequence[Row], Sequence[int]], None]


def _one_model(rows: Sequence[Row], counts: Sequence[int]) -> None:
    """The Route of a model that answers every row."""


class Live:
    """Rows that are answered side by side: `admit` begins some, `advance` draws tokens for each, `leave` frees a slot.

    `route` hears before each forward pass which rows are in the stream, and how many of its tokens are each one's.
    `decode` is how drawn tokens attend, `multiply` the product with the output layer. Without `guesses`, every pass
    draws one token a row. Passes that look at up to `compiled_keys` are those of compiled.py, in place of `decode`.
    `recorded` passes, on a GPU, are without any of these and go through no `route`.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        capacity: int,
        *,
        route: Route = _one_model,
        decode: Decoding = Decode,
        multiply: Multiply = wide_answer,
        guesses: bool = True,
        compiled_keys: float = 0,
        recorded: bool = False,
    ) -> None:
        self.model, self.route, self.decode, self.multiply = model, route, decode, multiply
        self.cache = Cache(slots, capacity)
        self.guesses = Guesses() if guesses and not recorded else None
        self.compiled_keys = compiled_keys
        self.recordings = Recordings(model, self.cache) if recorded else None
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.shared = 0
        if compiled_keys:
            _compiled()

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self.cache.rows - len(self.rows)

    @torch.no_grad()
    def share(self, prefix: Int[np.ndarray, "P"]) -> None:
        """Compute what every later prompt continues. Only before the first `admit`."""
        self.shared = len(prefix)
        self._learn(prefix.tolist(), self.shared)
        attend = Prefill(self.cache, Layout.alone(self.shared), None)
        more = filler(self.shared, self.model.device)
        _forward(self.model, *with_filler(prefix, np.arange(self.shared), attend, more))

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Prefill the rows' prompts, one stream for all, draw their first tokens, and return the rows."""
        counts = [len(row.prompt) for row in rows]
        self.cache.reserve(max(counts))
        tokens = np.concatenate([row.prompt for row in rows])
        positions = np.concatenate([np.arange(self.shared, self.shared + count) for count in counts])
        attend = Prefill(self.cache, Layout.alone(*counts), len(self.rows))
        more = filler(len(tokens), self.model.device)
        self.route(rows, [*counts[:-1], counts[-1] + more])
        hidden = _forward(self.model, *with_filler(tokens, positions, attend, more))
        ends = torch.tensor(np.cumsum(counts) - 1, device=hidden.device)
        self.rows += rows
        self.lengths += counts
        drawn = _draw(self.multiply(hidden[ends], self.model.head).float(), rows, [0] * len(rows))
        for row, token in zip(rows, drawn, strict=True):
            row.take(token)
            self._learn([*row.prompt.tolist(), token.id], len(row.prompt) + 1)
        return rows

    @torch.no_grad()
    def advance(self) -> Sequence[Row]:
        """Feed each row its last token and what is guessed to follow, draw what does, and return the rows."""
        said = [len(row.tokens) for row in self.rows]
        fed = [[row.tokens[-1], *self._guess(row)] for row in self.rows]
        counts = [len(tokens) for tokens in fed]
        slots = np.repeat(np.arange(len(fed)), counts)
        places = np.concatenate([at + np.arange(count) for at, count in zip(self.lengths, counts, strict=True)])
        self.cache.reserve(int(places.max()) + 1)
        self.route(self.rows, counts)
        whose = [self.rows[slot] for slot in slots]
        which = [before + n for before, count in zip(said, counts, strict=True) for n in range(count)]
        drawn = _draw(self._logits(np.concatenate(fed), slots, places), whose, which)
        for row, tokens, end in zip(self.rows, fed, accumulate(counts), strict=True):
            self._say(row, drawn[end - len(tokens) : end], tokens[1:])
        self.lengths = [at + len(r.tokens) - n for at, r, n in zip(self.lengths, self.rows, said, strict=True)]
        return list(self.rows)

    def _logits(self, tokens: np.ndarray, slots: np.ndarray, places: np.ndarray) -> Tensor:
        if self.recordings:
            return self.recordings.logits(tokens, places, self.shared)
        if int(places.sum()) + len(tokens) * (self.shared + 1) <= self.compiled_keys and self.model.blocks:
            where = (torch.as_tensor(tokens), torch.as_tensor(places + self.shared), slots, places)
            hidden = _compiled()(self.model.blocks, self.cache, *where)
            return self.multiply(hidden, self.model.head).float()
        attend = self.decode(self.cache, *(torch.tensor(part, device=self.model.device) for part in (slots, places)))
        hidden = _forward(self.model, tokens, places + self.shared, attend)
        return self.multiply(hidden, self.model.head).float()

    def _guess(self, row: Row) -> Sequence[int]:
        room = min(CHEAP_TOKENS // len(self.rows) - 1, MOST_GUESSES, row.how.max_new_tokens - len(row.tokens) - 1)
        if self.guesses is None or room <= 0:
            return ()
        return self.guesses.guess([*row.prompt[-1:].tolist(), *row.tokens[-2:]][-2:], room)

    def _say(self, row: Row, drawn: Sequence[Token], guessed: Sequence[int]) -> None:
        """Take what was drawn until a guess before it was wrong, or the answer has ended."""
        before = len(row.tokens)
        for token, guess in zip(drawn, [*guessed, None], strict=True):
            row.take(token)
            if token.id != guess or stopped(row, self.model):
                break
        new = len(row.tokens) - before
        self._learn([*row.prompt[-1:].tolist(), *row.tokens[-new - 2 :]], new)

    def _learn(self, tokens: Sequence[int], new: int) -> None:
        if self.guesses is not None:
            self.guesses.learn(tokens, new)

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
    finished: list[Completion | None] = [None] * len(prompts)
    passes = how.max_new_tokens * math.ceil(len(prompts) / how.batch)
    # Of all memory and not of the free: a run that goes on must decide as before.
    room_bytes = available_bytes(model.device) / 4 if passes >= MANY_PASSES and model.blocks else 0
    halve = passes >= HALVE_FROM_PASSES and min(how.batch, len(prompts)) <= HALVE_UP_TO_ROWS
    with kept_twice(model.hf, room_bytes, halve=halve):
        compiled_keys = COMPILED_KEYS / torch.get_num_threads() if passes >= MANY_PASSES and compiles(model) else 0
        for row, stop in _answered(model, prompts, how, compiled_keys):
            finished[row.place] = _completion(row, stop, model)
            progress(len(prompts) - finished.count(None))
    return [completion for completion in finished if completion is not None]


def _answered(
    model: Model, prompts: Sequence[np.ndarray], how: Sampling, compiled_keys: float
) -> Iterator[tuple[Row, Stop]]:
    """Rows as they end, and why."""
    shared = _shared_prefix(prompts)
    longest = max((len(prompt) - shared for prompt in prompts), default=0)
    recorded = records(model) and how.max_new_tokens >= RECORD_FROM_PASSES
    capacity = longest + how.max_new_tokens
    slots = min(_slots(model, how, capacity), len(prompts))
    capacity = -(-capacity // 64) * 64 if recorded else capacity
    live = Live(model, slots, capacity, compiled_keys=compiled_keys, recorded=recorded)
    if shared:
        live.share(prompts[0][:shared])
    waiting = [Row(prompt[shared:], how, place) for place, prompt in enumerate(prompts)]
    while waiting or live.rows:
        if waiting and (live.free >= max(1, live.cache.rows // 4) or not live.rows):
            count = how_many(waiting, live.free)
            new = live.admit(waiting[:count])
            del waiting[:count]
        else:
            new = live.advance()
        for row in new:
            if stop := stopped(row, model):
                live.leave(row)
                yield row, stop


def _slots(model: Model, how: Sampling, capacity: int) -> int:
    """Rows to decode at once: `how.batch`; on a GPU more, as far as a quarter of its memory holds their keys."""
    if model.device.type != "cuda" or not model.blocks:
        return how.batch
    fits = available_bytes(model.device) / 4 / (model.blocks.cache_bytes * capacity)
    return max(how.batch, min(GPU_BATCH, int(fits)))


def how_many(waiting: Sequence[Row], free: int) -> int:
    """How many of the first waiting rows to admit together: at least one, and no more tokens than PREFILL_TOKENS."""
    sizes = np.cumsum([len(row.prompt) for row in waiting[:free]])
    return max(1, int((sizes <= PREFILL_TOKENS).sum()))


def compiles(model: Model) -> bool:
    """Whether compiled.py knows the model."""
    return model.blocks is not None and model.device.type == "cpu" and model.blocks.norm.weight.dtype == torch.float32


def _compiled() -> Callable[..., Tensor]:
    from .compiled import compiled_pass  # only now: Numba takes 0.3 s, and some the first time

    return compiled_pass


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


def _draw(logits: Float[Tensor, "N V"], rows: Sequence[Row], which: Sequence[int]) -> list[Token]:
    """A token from each distribution, which is that of the row's token number `which`."""
    scores = torch.log_softmax(logits, -1)  # not logsumexp, which adds up one row in another order than several
    chosen = logits.argmax(-1)
    warm = [n for n, row in enumerate(rows) if row.how.temperature > 0]
    if warm:
        dials = [(rows[n].how.temperature, rows[n].how.top_p, rows[n].uniforms[which[n]]) for n in warm]
        temperature, top_p, draws = torch.tensor(np.array(dials, dtype=np.float32), device=logits.device).T
        likely = torch.softmax(logits[warm] / temperature[:, None], -1)
        chosen[warm] = _inverse_cdf(likely, draws, top_p[:, None])
    log_probs = scores.gather(1, chosen[:, None])[:, 0]
    rivals = [_rivals(scores[n], row.alternatives) if row.alternatives else [] for n, row in enumerate(rows)]
    return list(map(Token, chosen.tolist(), log_probs.tolist(), rivals))


def _rivals(scores: Float[Tensor, "V"], count: int) -> list[tuple[int, float]]:
    most = scores.topk(count)
    return list(zip(most.indices.tolist(), most.values.tolist(), strict=True))


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


def _sample_plainly(model: Model, prompt: np.ndarray, how: Sampling, place: int) -> Completion:
    """Recompute the whole row for each token: for architectures that cannot be packed."""
    row = Row(prompt, how, place)
    while True:
        tokens = torch.as_tensor([*prompt.tolist(), *row.tokens], device=model.device)[None]
        row.take(*_draw(model.hf(tokens, use_cache=False).logits[0, -1:].float(), [row], [len(row.tokens)]))
        stop = stopped(row, model)
        if stop:
            return _completion(row, stop, model)
