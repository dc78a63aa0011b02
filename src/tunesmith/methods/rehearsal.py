"""Rehearsal: beside the examples, a model in training repeats what its base wrote by itself, and so keeps it.

    minimised: answers' loss + strength * mean_t -log p(y_t | y_<t)        y drawn from the base p_0

But for a constant the second part estimates KL(p_0 || p): what the base could do anywhere is held, and no data is
needed for it. Repeating one's own output against forgetting: Robins 1995, "Catastrophic forgetting, rehearsal and
pseudorehearsal"; texts drawn from a random first token: Liu et al. 2023 (arXiv 2305.17888).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from ..model.load import Model
from ..model.sample import Sampling, sample
from ..texts import beginning
from ..types import Example
from .order import shuffled

TEXT_TOKENS, FEWEST_TEXTS, MOST_TEXTS = 96, 64, 256
REHEARSED = "rehearsed"
ROWS_PER_TEXT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The base's own texts (`own_text` made them), and how heavily they weigh."""

    texts: Sequence[Example] = ()
    strength: float = 0.0

    def of_step(self, step: int, rows: int, trained_tokens: float, seed: int) -> list[Example]:
        """A text for every 16 rows, in turns; over 16 rows it weighs `strength` times what they do."""
        count = len(self.texts)
        if not count or not self.strength:
            return []
        places = range(step * rows // ROWS_PER_TEXT, (step + 1) * rows // ROWS_PER_TEXT)
        chosen = [self.texts[int(shuffled(seed, place // count, count)[place % count])] for place in places]
        due = self.strength * trained_tokens * ROWS_PER_TEXT * len(chosen) / rows
        weight = due / max(sum(float(text.weights.sum()) for text in chosen), 1.0)
        return [replace(text, weights=text.weights * np.float32(weight)) for text in chosen]

    @property
    def tokens_a_row(self) -> float:
        """Tokens of rehearsal for each row, on average."""
        if not self.texts or not self.strength:
            return 0.0
        return float(np.mean([len(text.tokens) for text in self.texts])) / ROWS_PER_TEXT


def texts_for(rows: float) -> int:
    """How many texts so many rows want, so that none comes twice and is learnt by heart; no more than 256."""
    return min(max(math.ceil(rows / ROWS_PER_TEXT), FEWEST_TEXTS), MOST_TEXTS)


def own_texts(base: Model, count: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> list[Example]:
    """Texts that the base writes when it is given nothing but a first token, drawn evenly from its vocabulary.

    Before that stands the token with which its tokenizer begins a text, if it does.
    """
    special = set(base.tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(base.tokenizer)) if token not in special])
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    begins = beginning(base.tokenizer)
    starts = [np.array([*begins, ordinary[place]]) for place in draw.integers(len(ordinary), size=count)]
    how = Sampling(max_new_tokens=TEXT_TOKENS - len(starts[0]), temperature=1.0, seed=seed)
    drawn = sample(base, starts, how, progress)
    whole = [np.concatenate([start, text.tokens]) for start, text in zip(starts, drawn, strict=True)]
    return [own_text(tokens, f"rehearsal {number}", begins) for number, tokens in enumerate(whole, start=1)]


def own_text(tokens: Int[np.ndarray, "T"], name: str, begins: Sequence[int] = ()) -> Example:
    """A text of the base's own as an Example that CrossEntropy knows for one.

    Its first token, and the one that `begins` a text before it, were given to the base and are not trained.
    """
    given = 1 + (tokens[:1].tolist() == list(begins))
    weights = np.array([0.0] * given + [1.0] * (len(tokens) - given), dtype=np.float32)
    return Example(tokens=tokens, weights=weights, id=name, extra={REHEARSED: np.ones_like(weights)})
