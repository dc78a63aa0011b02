"""Proximal policy optimisation against a reward model, as in InstructGPT.

    reward_t  = - kl (log p_old(y_t) - log p_ref(y_t)) + [t is the last token] score(x, y)
    A_t       = sum_l (gamma lambda)^l d_{t+l},   d_t = reward_t + gamma V(s_{t+1}) - V(s_t)        (GAE)
    policy    = max(-A_t r_t, -A_t clip(r_t, 1 - c, 1 + c)),   r_t = p(y_t) / p_old(y_t)
    value     = max((V - R_t)^2, (clip(V, V_old - c, V_old + c) - R_t)^2) / 2,   R_t = A_t + V_old(s_t)
    loss      = mean over sampled tokens of policy + value_weight value   -   mix x mean over examples' tokens of log p

Schulman et al. 2017 (arXiv 1707.06347); GAE: arXiv 1506.02438, eq. 16; the token-wise penalty and its adaptive
coefficient: Ziegler et al. 2019 (arXiv 1909.08593); the mix: Ouyang et al. 2022 (arXiv 2203.02155, eq. 2). Advantages
are whitened over the rollout. V is a scalar head on the policy's own trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from ..tensors import Batch, LossTerms, Need, Scores
from ..types import Example
from .annotate import Group

GAMMA, LAMBDA = 1.0, 0.95
SMALLEST_SPREAD = 0.05  # of advantages; scores have a spread of 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoLoss:
    """Clipped policy and value losses. Tokens with `extra["mix"]` above 0 are imitated instead, with that weight."""

    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    needs: frozenset[Need] = frozenset({"log_probs", "values"})

    def count(self, batch: Batch) -> float:
        """Sampled tokens."""
        return float((batch.extra["mix"] == 0).sum())

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        """Sum over tokens; reports sums of clipped ratios, squared log-ratios and value losses."""
        extra = batch.extra
        sampled = (extra["mix"] == 0).to(scores.log_probs.dtype)
        change = (scores.log_probs - extra["old_log_probs"]) * sampled
        ratio = change.exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy = torch.maximum(-extra["advantages"] * ratio, -extra["advantages"] * clipped)
        near = extra["old_values"] + (scores.values - extra["old_values"]).clamp(-self.value_clip, self.value_clip)
        value = torch.maximum((scores.values - extra["returns"]) ** 2, (near - extra["returns"]) ** 2) / 2
        imitated = -extra["mix"] * scores.log_probs
        report = {
            "clipped": float(((ratio - 1).abs() > self.clip).sum()),
            "squared_change": float((change.detach() ** 2).sum()),
            "value_loss": float((value.detach() * sampled).sum()),
        }
        return LossTerms(sum=((policy + self.value_weight * value) * sampled + imitated).sum(), report=report)


def gae(
    rewards: Float[np.ndarray, "T"], values: Float[np.ndarray, "T"], gamma: float = GAMMA, lam: float = LAMBDA
) -> Float[np.ndarray, "T"]:
    """Advantages of one answer's tokens; after its last token nothing comes, so the next value is 0."""
    advantages = np.zeros(len(rewards))
    ahead = next_value = 0.0
    for t in reversed(range(len(rewards))):
        ahead = rewards[t] + gamma * next_value - values[t] + gamma * lam * ahead
        advantages[t], next_value = ahead, values[t]
    return advantages


def whiten(values: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Mean 0, variance 1; less where values hardly differ, or noise would be made as large as news."""
    return (values - values.mean()) / max(values.std(), SMALLEST_SPREAD)


def ppo_examples(groups: Sequence[Group], scores: Sequence[float], kl: float) -> list[Group]:
    """Sampled answers with what PpoLoss reads, from `old_log_probs`, `old_values`, `reference` and one score each."""
    answers = [example for group in groups for example in group]
    places = [np.flatnonzero(answer.weights) for answer in answers]
    advantages, returns = [], []
    for answer, at, score in zip(answers, places, scores, strict=True):
        rewards = -kl * (answer.extra["old_log_probs"][at] - answer.extra["reference"][at])
        rewards[-1] += score
        values = answer.extra["old_values"][at]
        advantages.append(gae(rewards, values))
        returns.append(advantages[-1] + values)
    white = np.split(whiten(np.concatenate(advantages)), np.cumsum([len(at) for at in places])[:-1])
    ready = []
    for answer, at, advantage, wanted in zip(answers, places, white, returns, strict=True):
        ready.append(_with(answer, at, {"advantages": advantage, "returns": wanted, "mix": np.zeros(len(at))}))
    filled = iter(ready)
    return [tuple(next(filled) for _ in group) for group in groups]


def imitated(examples: Sequence[Example], weight: float) -> list[Group]:
    """Examples to imitate beside the sampled answers, `weight` for each trained token."""
    none = ("old_log_probs", "old_values", "advantages", "returns", "reference")
    return [
        (replace(e, extra={**{name: np.zeros_like(e.weights) for name in none}, "mix": weight * e.weights}),)
        for e in examples
    ]


def imitates(group: Group) -> bool:
    """Whether the group is one of `imitated`, and holds no answer."""
    return any(bool(example.extra["mix"].any()) for example in group if "mix" in example.extra)


def adapted(kl: float, seen: float, target: float, episodes: int, horizon: int = 10_000) -> float:
    """The next penalty coefficient when sequences were `seen` nats from the reference and should be `target`."""
    error = float(np.clip((seen - target) / target, -0.2, 0.2))
    return kl * (1 + error * episodes / horizon)


def _with(example: Example, at: np.ndarray, numbers: dict[str, np.ndarray]) -> Example:
    extra = dict(example.extra)
    for name, values in numbers.items():
        extra[name] = np.zeros(len(example.tokens), dtype=np.float32)
        extra[name][at] = values
    return replace(example, extra=extra)
