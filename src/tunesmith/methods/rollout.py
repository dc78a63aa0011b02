"""Where the batches of PPO and GRPO come from: the policy answers prompts, answers are scored, and trained on.

A rollout is written to the disk before its first step. A resumed run reads it back, so the same command ends with the
same weights, bit for bit, wherever it was killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.pack import cut_to_fit, pack_groups
from ..data.render import prompt_tokens
from ..errors import FolderError, TrainingError
from ..folder import rename_file, storage_errors
from ..model.load import Model
from ..model.sample import Sampling, sample
from ..tensors import Batch
from ..types import Completion, Example, Item
from .annotate import Group
from .order import shuffled
from .ppo import imitates


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A sampled answer to an item: prompt and answer as tokens, the answer's trained."""

    item: Item
    example: Example
    completion: Completion

    @property
    def ended(self) -> bool:
        """Whether the answer came to its end of turn."""
        return self.completion.stop == "end_of_turn"


@runtime_checkable
class Reward(Protocol):
    """What scores answers. NaN where it could not."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """A score for each answer."""
        ...


@runtime_checkable
class Shape(Protocol):
    """How a method turns scored answers into Examples to train on, and what it reports of them."""

    def __call__(
        self, groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]
    ) -> tuple[list[Group], Mapping[str, float]]:
        """Groups with the numbers that the loss reads; `before` are the statistics of the last rollout."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """How many answers, how often. `prompts` x `group` answers a rollout, each seen `epochs` times."""

    rollouts: int
    prompts: int
    group: int
    epochs: int
    batch: int
    budget_tokens: int
    missing_end: float
    seed: int

    @property
    def parts(self) -> int:
        """Optimizer steps in one pass over a rollout."""
        return max(1, math.ceil(self.prompts * self.group / self.batch))


class RolloutSteps:
    """Steps over one rollout after another. `statistics` tells of the newest.

    Raises TrainingError where scores or log-probabilities of a rollout are not numbers.
    """

    def __init__(
        self,
        model: Model,
        items: Sequence[Item],
        how: Sampling,
        plan: RolloutPlan,
        reward: Reward,
        shape: Shape,
        store: Path,
    ) -> None:
        self.model, self.items, self.how, self.plan = model, items, how, plan
        self.reward, self.shape, self.store = reward, shape, store
        self.steps = plan.rollouts * plan.epochs * plan.parts
        self.statistics: Mapping[str, float] = {}
        self.newest = -1
        self.groups: list[Group] = []

    def __call__(self, step: int) -> list[Batch]:
        """The batches of a step; the first step of a rollout makes it, or reads it back."""
        rollout, inner = divmod(step, self.plan.epochs * self.plan.parts)
        if rollout != self.newest:
            self._turn_to(rollout, begins=inner == 0)
        epoch, part = divmod(inner, self.plan.parts)
        order = shuffled(self.plan.seed, 1_000_003 * (rollout + 1) + epoch, len(self.groups))
        chosen = self._share(order, part)
        packs = self.model.packs
        budget = self.plan.budget_tokens if packs else 1
        # Answers to a prompt stand in one stream to share it, not because the loss compares them.
        groups = [part for n in chosen for part in cut_to_fit(self.groups[n], budget_tokens=budget, share=packs)]
        return pack_groups(groups, budget_tokens=budget, share=packs)

    @property
    def rows_a_step(self) -> float:
        """Answers of a step, on average over the parts of a pass."""
        return self.plan.prompts * self.plan.group / self.plan.parts

    def row_tokens(self) -> list[float]:
        """Tokens of every answer that was learned from, each with its prompt."""
        return [float(size) for path in sorted(self.store.glob("*.safetensors")) for size in _read(path)[0]["lengths"]]

    def _share(self, order: np.ndarray, part: int) -> list[int]:
        """A part's share of the answers, never none, and of what is imitated beside them, in the order of both."""
        beside = np.array([imitates(self.groups[n]) for n in order])
        answers, shown = (np.array_split(order[kind], self.plan.parts)[part] for kind in (~beside, beside))
        if not len(answers):
            answers = order[~beside][[part % int((~beside).sum())]]
        mine = {*answers.tolist(), *shown.tolist()}
        return [int(n) for n in order if n in mine]

    def _turn_to(self, rollout: int, begins: bool) -> None:
        path = self.store / f"{rollout:06d}.safetensors"
        if begins and not path.is_file():
            before = read_rollout(self.store / f"{rollout - 1:06d}.safetensors")[1] if rollout else {}
            write_rollout(path, *self._make(rollout, before))
        self.groups, self.statistics = read_rollout(path)
        self.newest = rollout

    def _make(self, rollout: int, before: Mapping[str, float]) -> tuple[list[Group], Mapping[str, float]]:
        items = [self.items[place] for place in _drawn(self.plan, rollout, len(self.items))]
        answers = ask(self.model, items, self.plan.group, self.how, seed=seed_of(self.plan.seed, rollout))
        raw = self.reward(answers)
        scores = settled(raw, self.plan.missing_end)
        size = self.plan.group
        groups = [tuple(a.example for a in answers[at : at + size]) for at in range(0, len(answers), size)]
        ready, shaped = self.shape(groups, scores, before)
        statistics = {"rollout": rollout, **describe(answers, raw, scores), **shaped}
        _refuse_nonsense(statistics, rollout)
        return ready, statistics


def ask(model: Model, items: Sequence[Item], group: int, how: Sampling, *, seed: int) -> list[Answer]:
    """`group` answers to each item, neighbours in the list."""
    prompts = [np.array(prompt_tokens(item.prompt, model.tokenizer, item.tools), dtype=np.int64) for item in items]
    places = [place for place in range(len(items)) for _ in range(group)]
    completions = sample(model, [prompts[place] for place in places], replace(how, seed=seed))
    return [
        Answer(
            item=items[place],
            example=_example(prompts[place], completion, f"{items[place].id}#{n}"),
            completion=completion,
        )
        for n, (place, completion) in enumerate(zip(places, completions, strict=True))
    ]


def settled(scores: Sequence[float], missing_end: float) -> list[float]:
    """Scores to train on: `missing_end` where there is none (NaN).

    A reward model has none for an answer that never ended: there is no end of turn to read it at (Huang et al. 2024,
    arXiv 2403.17031). A function has none where it failed.
    """
    return [score if math.isfinite(score) else missing_end for score in scores]


def describe(answers: Sequence[Answer], raw: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
    """What a rollout looks like from outside. Entropy is estimated by the answers' own log-probabilities."""
    lengths = [len(answer.completion.tokens) for answer in answers]
    return {
        "score": float(np.mean(scores)),
        "score_sd": float(np.std(scores)),
        "length_tokens": float(np.mean(lengths)),
        "repetition": float(np.mean([repetition(answer.completion.tokens) for answer in answers])),
        "entropy": -float(sum(float(a.completion.log_probs.sum()) for a in answers) / sum(lengths)),
        "unended": float(np.mean([not answer.ended for answer in answers])),
        "unscored": float(sum(not math.isfinite(score) for score in raw)),
    }


def repetition(tokens: np.ndarray, size: int = 3) -> float:
    """Share of `size`-grams that stood earlier in the same answer."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def seed_of(*parts: object) -> int:
    """A seed that depends on `parts` alone."""
    return int.from_bytes(blake2b(":".join(map(str, parts)).encode(), digest_size=6).digest(), "big")


def write_rollout(path: Path, groups: Sequence[Group], statistics: Mapping[str, float]) -> None:
    """Whole or not at all."""
    examples = [example for group in groups for example in group]
    arrays = {
        "tokens": np.concatenate([example.tokens for example in examples]),
        "weights": np.concatenate([example.weights for example in examples]),
        "lengths": np.array([len(example.tokens) for example in examples]),
        "groups": np.array([len(group) for group in groups]),
        **{f"extra:{name}": np.concatenate([e.extra[name] for e in examples]) for name in examples[0].extra},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    about = {"ids": [example.id for example in examples], "statistics": dict(statistics)}
    with storage_errors(path):
        # One entry: safetensors writes several in an order that is another each time.
        save_file(arrays, aside, metadata={"about": json.dumps(about)})
    rename_file(aside, path)


def read_rollout(path: Path) -> tuple[list[Group], Mapping[str, float]]:
    """What write_rollout wrote. Raises FolderError where it is gone or damaged."""
    arrays, about = _read(path)
    cuts = np.cumsum(arrays["lengths"])[:-1]
    parts = {name: np.split(values, cuts) for name, values in arrays.items() if name not in ("lengths", "groups")}
    names = [name for name in parts if name.startswith("extra:")]
    examples = iter(
        Example(
            tokens=parts["tokens"][n],
            weights=parts["weights"][n],
            id=identity,
            extra={name.removeprefix("extra:"): parts[name][n] for name in names},
        )
        for n, identity in enumerate(about["ids"])
    )
    groups = [tuple(next(examples) for _ in range(int(size))) for size in arrays["groups"]]
    return groups, about["statistics"]


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fix = "Delete the folder of this update's checkpoints and rollouts, and run again to start it afresh."
        raise FolderError(f"the answers being learned from cannot be read: {error}", where=str(path), fix=fix) from None


def _drawn(plan: RolloutPlan, rollout: int, items: int) -> list[int]:
    """Which items a rollout asks: through all of them in a new order each time round."""
    places = range(rollout * plan.prompts, (rollout + 1) * plan.prompts)
    return [int(shuffled(plan.seed, place // items, items)[place % items]) for place in places]


def _example(prompt: np.ndarray, completion: Completion, identity: str) -> Example:
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion.tokens))]).astype(np.float32)
    extra = {"old_log_probs": np.concatenate([np.zeros(len(prompt)), completion.log_probs]).astype(np.float32)}
    return Example(tokens=np.concatenate([prompt, completion.tokens]), weights=weights, id=identity, extra=extra)


def _refuse_nonsense(statistics: Mapping[str, float], rollout: int) -> None:
    wrong = [name for name, value in statistics.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingError(
            f"{wrong[0]} of rollout {rollout + 1} is not a finite number; the weights are those before it",
            fix="Lower train.learning_rate, or look at the reward.",
        )
