"""The reward model: a scalar that is higher for the answer that people chose.

    loss = - log sigmoid(r(x, chosen) - r(x, rejected) - margin)          averaged over the pairs of the step

Bradley and Terry 1952, as in Christiano et al. 2017 (arXiv 1706.03741); the margin, how much better people found the
chosen answer, as in Llama 2 (arXiv 2307.09288, eq. 2). The score is read where the end of turn stands, so it judges a
finished answer: a pad or the token before the end would judge something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ..data.pack import pack_groups
from ..data.render import end_of_turn
from ..model.load import Model
from ..model.score import score
from ..tensors import Batch, LossTerms, Need, Scores
from ..types import Example
from .pairs import pair_count

VALUES: frozenset[Need] = frozenset({"values"})
SCORE_TOKENS, GROUP = 4096, 32


class BradleyTerry:
    """Negative log-likelihood of the choices, in nats a pair."""

    needs = VALUES

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return float(pair_count(batch))

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over pairs; reports the sum of right ones."""
        chosen, rejected = scores.values.view(-1, 2).unbind(-1)
        margin = batch.extra["margin"].view(-1, 2)[:, 0]
        right = float((chosen > rejected).sum())
        return LossTerms(sum=-logsigmoid(chosen - rejected - margin).sum(), report={"accuracy": right})


def at_the_end(example: Example, margin: float = 0.0) -> Example:
    """The Example with its last token, the end of turn, as the only scored one."""
    weights = np.zeros(len(example.tokens), dtype=np.float32)
    weights[-1] = 1.0
    return Example(tokens=example.tokens, weights=weights, id=example.id, extra={"margin": weights * margin})


def read_there(batch: Batch) -> Batch:
    """The batch with the head at the scored tokens themselves, not before them where they are predicted."""
    return replace(batch, index=batch.index + 1)


@torch.no_grad()
def rewards(model: Model, answers: Sequence[Example]) -> np.ndarray:
    """The reward [N] of each answer that has ended. Equal prompts are computed once a stream.

    Where several tokens end an answer, each is read at the one that choices end with: at another, whose score was never
    trained, a policy would find rewards for nothing.
    """
    end = end_of_turn(model.tokenizer, model.eos_ids)
    budget = SCORE_TOKENS if model.packs else 1
    alike: dict[bytes, list[int]] = {}
    for place, answer in enumerate(answers):
        prompt = answer.tokens[: int(np.flatnonzero(answer.weights)[0])]
        alike.setdefault(prompt.tobytes(), []).append(place)
    groups = []
    for places in alike.values():
        ended = [_ended(answers[place], end, str(place)) for place in places]
        groups += [ended[at : at + GROUP] for at in range(0, len(ended), GROUP)]
    found = np.zeros(len(answers))
    for batch in pack_groups(groups, budget_tokens=budget, share=model.packs):
        values = score(model, read_there(batch).to(model.device), VALUES).values
        found[[int(name) for name in batch.ids]] = values.double().cpu().numpy()
    return found


def _ended(answer: Example, end: int, name: str) -> Example:
    return replace(at_the_end(answer), tokens=np.append(answer.tokens[:-1], end), id=name)
