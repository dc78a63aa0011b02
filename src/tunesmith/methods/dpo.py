"""Direct preference optimisation: learn from choices without a reward model and without sampling.

    h = sum_t log p(chosen)/p_ref(chosen) - sum_t log p(rejected)/p_ref(rejected)
    sigmoid:  loss = - (1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       e = label smoothing
    ipo:      loss = (h - 1 / (2 beta))^2                                         averaged over the pairs of the step

Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); smoothing for choices that are wrong with probability e: Mitchell 2023;
IPO: Azar et al. 2023 (arXiv 2310.12036, eq. 17). The reference is the model before training; its log-probabilities do
not change and are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.nn.functional import logsigmoid

from ..tensors import Batch, LossTerms, Need, Scores
from .pairs import pair_count, per_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """DPO or IPO over pairs whose Examples carry the reference's log-probabilities as `extra["reference"]`."""

    beta: float = 0.1
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    smoothing: float = 0.0
    needs: frozenset[Need] = frozenset({"log_probs"})

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return float(pair_count(batch))

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over pairs; reports sums of right ones and of the implicit rewards beta log p / p_ref."""
        ratios = per_answer(scores.log_probs - batch.extra["reference"], batch)
        chosen, rejected = ratios.unbind(-1)
        h = chosen - rejected
        if self.kind == "ipo":
            losses = (h - 1 / (2 * self.beta)) ** 2
        else:
            likely, unlikely = logsigmoid(self.beta * h), logsigmoid(-self.beta * h)
            losses = -(1 - self.smoothing) * likely - self.smoothing * unlikely
        report = {
            "accuracy": float((h > 0).sum()),
            "chosen_reward": self.beta * float(chosen.detach().sum()),
            "rejected_reward": self.beta * float(rejected.detach().sum()),
        }
        return LossTerms(sum=losses.sum(), report=report)
