"""Group-relative policy optimisation: several answers to a prompt are each other's baseline; no value function.

    A_i   = (r_i - mean r) / std r            over the group             (grpo)
    A_i   = r_i - mean of the others' r                                  (rloo)
    loss  = mean over sampled tokens of  max(-A r_t, -A clip(r_t, 1 - c, 1 + c)) + kl k_t
    k_t   = q - log q - 1,   q = p_ref(y_t) / p(y_t)        an estimate of KL(p, p_ref) that is never negative

GRPO: Shao et al. 2024 (arXiv 2402.03300, eqs. 3-4); RLOO: Ahmadian et al. 2024 (arXiv 2402.14740). Tokens are averaged
over the whole step, so long answers are not favoured (Yu et al. 2025, arXiv 2503.14476). A group whose answers all
score the same says nothing about which was better: it is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from ..tensors import Batch, LossTerms, Need, Scores
from .annotate import Group

Advantage = Literal["grpo", "rloo"]
ALIKE = 1e-5  # a reward model gives equal answers scores that differ by rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoLoss:
    """Clipped policy loss and penalty. `kl` 0 needs no `extra["reference"]`."""

    clip: float = 0.2
    kl: float = 0.0
    needs: frozenset[Need] = frozenset({"log_probs"})

    def count(self, batch: Batch) -> float:
        """Sampled tokens."""
        return float(len(batch.targets))

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over tokens; reports sums of clipped ratios and squared log-ratios."""
        change = scores.log_probs - batch.extra["old_log_probs"]
        ratio = change.exp()
        advantages = batch.extra["advantages"]
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip))
        if self.kl:
            log_q = batch.extra["reference"] - scores.log_probs
            losses = losses + self.kl * (log_q.exp() - log_q - 1)
        report = {
            "clipped": float(((ratio - 1).abs() > self.clip).sum()),
            "squared_change": float((change.detach() ** 2).sum()),
        }
        return LossTerms(sum=losses.sum(), report=report)


def group_advantages(scores: Float[np.ndarray, "N"], how: Advantage) -> Float[np.ndarray, "N"]:
    """How much better each answer of a group is than the others; all zero where they are alike."""
    if len(scores) < 2 or np.ptp(scores) <= ALIKE:
        return np.zeros(len(scores))
    centred = scores - scores.mean()
    return centred / scores.std(ddof=1) if how == "grpo" else centred * len(scores) / (len(scores) - 1)


def grpo_examples(groups: Sequence[Group], scores: Sequence[float], how: Advantage) -> tuple[list[Group], int]:
    """Groups with `advantages`, without those that say nothing; and how many these were.

    Where no group says anything, all are kept with advantages of zero, so that the step is one without a push.
    """
    ready, alike, at = [], 0, 0
    for group in groups:
        advantages = group_advantages(np.array(scores[at : at + len(group)]), how)
        at += len(group)
        alike += not advantages.any()
        ready.append((advantages.any(), tuple(_pushed(e, a) for e, a in zip(group, advantages, strict=True))))
    kept = [group for says_something, group in ready if says_something]
    return kept or [group for _, group in ready], alike


def _pushed(example, advantage):  # type: ignore[no-untyped-def]
    weights = (example.weights > 0).astype(np.float32)
    return replace(example, extra={**example.extra, "advantages": weights * np.float32(advantage)})
