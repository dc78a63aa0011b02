"""Who scores a policy's answers: what it is trained on, a judge that it never sees, and the user's own metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ..errors import ModelError, RecipeError
from ..evaluate.metrics import find_metric
from ..evaluate.rewarding import FunctionReward
from ..methods.annotate import annotate
from ..methods.reward import rewards
from ..methods.rollout import Answer, Reward, ask, repetition
from ..model.load import Model
from ..model.sample import Sampling
from ..recipe import Recipe
from ..screen import Screen
from ..train.meter import release_memory
from ..types import UNENDED, UNSCORED, Grade, Item, Measurement
from ..world import World
from .reward import JUDGE, REWARD, load_reward

SCORE_TOKENS = 4096
FUNCTION = "reward"  # what a function's scores are called; a reward model's are reward_score
MANY_ANSWERS = 16  # of which a function that works scores at least one
Reference = Callable[[], AbstractContextManager[Model]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Rewards by name; the first is trained on, `decides` names the one that chooses and judges."""

    rewards: Mapping[str, Reward]
    grades: Mapping[str, Grade]
    decides: str
    missing_end: float

    @property
    def trained_on(self) -> Reward:
        """The reward that the policy learns from."""
        return next(iter(self.rewards.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Answers to the items of a split, one each: scores by name [N] and nats from the reference [N],
    both models at the temperature of the answers."""

    answers: tuple[Answer, ...]
    scores: Mapping[str, Float[np.ndarray, "N"]]
    kl: Float[np.ndarray, "N"]
    seconds: float

    def measurement(self, arm: str) -> Measurement:
        """The same as an arm of results.json."""
        return Measurement(
            arm=arm,
            ids=tuple(answer.item.id for answer in self.answers),
            answers=tuple(answer.completion.text.strip() for answer in self.answers),
            scores=dict(self.scores),
            prompt_tokens=np.array([len(a.example.tokens) - len(a.completion.tokens) for a in self.answers]),
            completion_tokens=np.array([len(answer.completion.tokens) for answer in self.answers]),
            seconds=self.seconds,
        )


def open_panel(recipe: Recipe, root: Path, policy: Model, world: World, stack: ExitStack, screen: Screen) -> Panel:
    """Load who scores; `screen` says why a function gave no score.

    Raises RecipeError or ModelError where one is missing or reads other tokens than the policy. A function that scores
    none of many answers raises RecipeError when it is asked.
    """
    spec = recipe.reward
    found: dict[str, Reward] = {}
    judge = spec.judge
    if spec.by_function:
        worker = stack.enter_context(FunctionReward(spec.by, root, spec.seconds))
        found[FUNCTION] = _by_function(worker, screen)
    elif spec.by:
        found["reward_score"] = _by_model(_fitting(spec.by, REWARD, policy, world))
        judge = judge or (spec.by if (Path(spec.by) / JUDGE).is_dir() else "")
    elif recipe.method in ("ppo", "grpo"):
        fix = "Set reward: to the run folder of a reward model, or to file.py:function."
        raise RecipeError(f"method {recipe.method} needs a reward", where="reward", fix=fix)
    if judge:
        which = JUDGE if (Path(judge) / JUDGE).is_dir() else REWARD
        if which == REWARD and Path(judge).resolve() == Path(spec.by).resolve():
            fix = f"Train {judge} with preference.halves: true, name another run, or leave reward.judge out."
            raise RecipeError("the judge is the very model that is trained on", where="reward.judge", fix=fix)
        found["judge_score"] = _by_model(_fitting(judge, which, policy, world))
    grades = {name: find_metric(name, recipe.task, root) for name in recipe.task.also}
    return Panel(rewards=found, grades=grades, decides=list(found)[-1] if found else "", missing_end=spec.missing_end)


def look(model: Model, reference: Reference, panel: Panel, items: Sequence[Item], how: Sampling) -> Seen:
    """Ask every item once, always with the same random numbers, and score the answers."""
    release_memory()
    begun = time.monotonic()
    answers = ask(model, items, 1, how, seed=how.seed)
    asked = time.monotonic() - begun
    groups = [(answer.example,) for answer in answers]
    # Nats between what both draw from: what was noted while drawing is of temperature 1.
    warmth = {"budget_tokens": SCORE_TOKENS, "temperature": how.temperature}
    if how.temperature != 1:
        groups = annotate(model, groups, {"log_probs": "old_log_probs"}, **warmth)
    with reference() as before:
        annotated = annotate(before, groups, {"log_probs": "reference"}, **warmth)
    kl = [float((e.extra["old_log_probs"] - e.extra["reference"])[e.weights > 0].sum()) for (e,) in annotated]
    given = {name: np.array(reward(answers)) for name, reward in panel.rewards.items()}
    scores = {name: np.where(np.isfinite(each), each, panel.missing_end) for name, each in given.items()}
    if FUNCTION in given:
        scores[UNSCORED] = 1.0 - np.isfinite(given[FUNCTION])
    texts = [answer.completion.text.strip() for answer in answers]
    scores |= {name: np.array(grade(items, texts), dtype=np.float64) for name, grade in panel.grades.items()}
    scores |= {
        "length_tokens": np.array([float(len(answer.completion.tokens)) for answer in answers]),
        "repetition": np.array([repetition(answer.completion.tokens) for answer in answers]),
        UNENDED: np.array([float(not answer.ended) for answer in answers]),
    }
    release_memory()
    return Seen(answers=tuple(answers), scores=scores, kl=np.array(kl), seconds=asked)


def wins(tuned: Seen, base: Seen, by: str) -> Float[np.ndarray, "N"]:
    """1 where the tuned model's answer scores higher than the base's to the same item, a half for a tie."""
    return np.sign(tuned.scores[by] - base.scores[by]) / 2 + 0.5


def at_temperature(recipe: Recipe, max_new_tokens: int) -> Sampling:
    """How answers are drawn, in training and in judging."""
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=recipe.policy.temperature,
        seed=recipe.evaluate.seed,
        batch=recipe.evaluate.batch,
    )


def _by_model(judge: Model) -> Reward:
    """Scores of finished answers; an unfinished one has no end of turn to be scored at."""

    def score(answers: Sequence[Answer]) -> list[float]:
        ended = [place for place, answer in enumerate(answers) if answer.ended]
        scores = [math.nan] * len(answers)
        found = rewards(judge, [replace(answers[place].example, extra={}) for place in ended]) if ended else []
        for place, value in zip(ended, found, strict=True):
            scores[place] = float(value)
        return scores

    return score


def _by_function(worker: FunctionReward, screen: Screen) -> Reward:
    """Scores by the user's function; what it failed of is told once the answers at hand are scored."""

    def score(answers: Sequence[Answer]) -> list[float]:
        told = len(worker.problems)
        scores = worker([answer.item for answer in answers], [answer.completion.text.strip() for answer in answers])
        for problem in worker.problems[told:]:
            screen.warn(f"an answer has no score: {problem}")
        if len(scores) >= MANY_ANSWERS and not any(map(math.isfinite, scores)):
            what = f"the function scored none of {len(scores)} answers ({'; '.join(worker.failures)})"
            raise RecipeError(what, where=worker.name, fix="Mend the function: the answers are said above.")
        return scores

    return score


def _fitting(name: str, which: str, policy: Model, world: World) -> Model:
    """A reward model that reads the policy's own tokens and turns."""
    model = load_reward(name, which, world)
    same = (
        model.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
        and model.tokenizer.chat_template == policy.tokenizer.chat_template
        and model.eos_ids[0] in policy.eos_ids
    )
    if not same:
        fix = "Train the reward model from the same base, or from one with the same tokenizer and chat template."
        raise ModelError(
            "reads other tokens or another chat template than the policy", where=f"reward: {name}", fix=fix
        )
    return model
