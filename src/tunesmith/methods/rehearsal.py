"""Rehearsal: beside the examples, a model in training repeats what its base wrote by itself, and so keeps it.

    loss = answers' loss + strength * mean_t (log p_0(y_t | y_<t) - log p(y_t | y_<t))        y drawn from the base p_0

The second part estimates KL(p_0 || p): what the base could do anywhere is held, and no data is needed for it. Repeating
one's own output against forgetting: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; texts drawn
from a random first token: Liu et al. 2023 (arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..model.load import Model
from ..model.sample import Sampling, sample
from ..types import Example
from .order import shuffled

TEXTS, TEXT_TOKENS = 64, 96
BASE = "base"
ROWS_PER_TEXT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The base's own texts, each trained token with its log-probability under the base in `extra`, and their weight."""

    texts: Sequence[Example] = ()
    strength: float = 0.0

    def of_step(self, step: int, rows: int, trained_tokens: float, seed: int) -> list[Example]:
        """One text for eight rows, in turns; their weights add up to `strength` times the rows' trained tokens."""
        if not self.texts or not self.strength:
            return []
        count = len(self.texts)
        each = max(1, rows // ROWS_PER_TEXT)
        places = range(step * each, (step + 1) * each)
        chosen = [self.texts[int(shuffled(seed, place // count, count)[place % count])] for place in places]
        weight = self.strength * trained_tokens / sum(float(text.weights.sum()) for text in chosen)
        return [replace(text, weights=text.weights * np.float32(weight)) for text in chosen]

    def tokens_beside(self, rows: int) -> float:
        """Tokens of rehearsal that a step of `rows` rows has for each row."""
        if not self.texts or not self.strength:
            return 0.0
        return max(1, rows // ROWS_PER_TEXT) * float(np.mean([len(text.tokens) for text in self.texts])) / rows


def own_texts(base: Model, count: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> list[Example]:
    """Texts that the base writes when it is given nothing but a first token, drawn evenly from its vocabulary."""
    special = set(base.tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(base.tokenizer)) if token not in special])
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    starts = [ordinary[[place]] for place in draw.integers(len(ordinary), size=count)]
    how = Sampling(max_new_tokens=TEXT_TOKENS - 1, temperature=1.0, seed=seed)
    drawn = sample(base, starts, how, progress)
    return [
        Example(
            tokens=np.concatenate([start, text.tokens]),
            weights=np.array([0.0] + [1.0] * len(text.tokens), dtype=np.float32),
            id=f"rehearsal {number}",
            extra={BASE: np.concatenate([[0.0], text.log_probs]).astype(np.float32)},
        )
        for number, (start, text) in enumerate(zip(starts, drawn, strict=True), start=1)
    ]
