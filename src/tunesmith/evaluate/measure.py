"""Answers and their scores: one function for every arm, so that rows, decoding and grading are the same for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ..data.pack import pack_one, pack_together
from ..data.render import prompt_tokens, render, render_last
from ..model.load import Model
from ..model.sample import Sampling, sample
from ..model.score import score
from ..types import UNENDED, Conversation, Example, Grade, Item, Measurement, Message
from .metrics import MODEL_METRICS
from .systems import Prompting

SCORE_TOKENS = 4096


def measure(
    model: Model,
    prompting: Prompting,
    items: Sequence[Item],
    grades: dict[str, Grade],
    how: Sampling,
    *,
    arm: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Ask the model every item under `prompting` and grade the answers.

    `grades` maps metric names to functions. `completion_loss` (nats per token of the reference) and `choice_accuracy`
    (of each item's choices) are computed from the model's probabilities; where there is no other metric, nothing is
    generated and the answers are empty. Where something is, `unended` says which answers the limit of tokens cut. An
    item of plain text has no prompt.
    """
    start = time.monotonic()
    prompts = [_prompt(model, prompting, item) for item in items]
    completions = sample(model, prompts, how, progress) if any(name not in MODEL_METRICS for name in grades) else []
    answers = [completion.text.strip() for completion in completions] or [""] * len(items)
    sizes = [len(completion.tokens) for completion in completions] or [0] * len(items)
    seconds = time.monotonic() - start
    scores = {
        name: np.array(grade(items, answers), dtype=np.float64)
        for name, grade in grades.items()
        if name not in MODEL_METRICS
    }
    if completions:
        scores[UNENDED] = np.array([float(completion.stop == "length") for completion in completions])
    if "completion_loss" in grades:
        scores["completion_loss"] = completion_losses(model, prompting, items)
    if "choice_accuracy" in grades:
        scores["choice_accuracy"] = choice_accuracies(model, prompting, items)
    return Measurement(
        arm=arm or prompting.name,
        ids=tuple(item.id for item in items),
        answers=tuple(answers),
        scores=scores,
        prompt_tokens=np.array([len(prompt) for prompt in prompts]),
        completion_tokens=np.array(sizes),
        seconds=seconds,
    )


def looked_up(arm: str, answers: Sequence[str], items: Sequence[Item], grades: dict[str, Grade]) -> Measurement:
    """A Measurement of answers that no model gave: nearest neighbour, majority."""
    scores = {
        name: np.array(grade(items, answers), dtype=np.float64)
        for name, grade in grades.items()
        if name not in MODEL_METRICS
    }
    return scored(arm, [item.id for item in items], scores, answers)


def scored(
    arm: str, ids: Sequence[str], scores: Mapping[str, np.ndarray], answers: Sequence[str] | None = None
) -> Measurement:
    """A Measurement of scores that are there already, so that it cost nothing; without `answers` they are empty."""
    none = np.zeros(len(ids), dtype=np.int64)
    return Measurement(
        arm=arm,
        ids=tuple(ids),
        answers=("",) * len(ids) if answers is None else tuple(answers),
        scores=scores,
        prompt_tokens=none,
        completion_tokens=none,
        seconds=0.0,
    )


def completion_losses(model: Model, prompting: Prompting, items: Sequence[Item]) -> np.ndarray:
    """Mean negative log-likelihood of each reference answer, end of turn included, in nats per token."""
    return -_per_token(*example_losses(model, [_answered(model, prompting, item, item.reference) for item in items]))


def choice_accuracies(model: Model, prompting: Prompting, items: Sequence[Item]) -> np.ndarray:
    """1 where the reference has the highest log-likelihood per token among the item's choices."""
    groups = [[_answered(model, prompting, item, text) for text in item.choices] for item in items]
    flat = _per_token(*group_losses(model, groups))
    right, at = [], 0
    for item in items:
        best = item.choices[int(np.argmax(flat[at : at + len(item.choices)]))]
        right.append(float(best == item.reference))
        at += len(item.choices)
    return np.array(right)


def example_losses(model: Model, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Per example: summed negative log-likelihood of its trained tokens in nats, and their number."""
    return group_losses(model, [[example] for example in examples])


@torch.no_grad()
def group_losses(model: Model, groups: Sequence[Sequence[Example]]) -> tuple[np.ndarray, np.ndarray]:
    """`example_losses` of the groups' Examples, one after the other.

    What a group begins with is computed once; neighbours share a forward pass, and with it what all of them begin with.
    """
    sums, counts = (np.zeros(sum(map(len, groups))) for _ in range(2))
    at = 0
    for run in _runs([sum(len(example.tokens) for example in group) for group in groups], SCORE_TOKENS):
        together = [groups[place] for place in run]
        for batch in [pack_together(together)] if model.packs else [pack_one([e]) for group in together for e in group]:
            log_probs = score(model, batch.to(model.device)).log_probs.double().cpu().numpy()
            weights, owner = batch.weights.numpy().astype(np.float64), at + batch.owner.numpy()
            np.add.at(sums, owner, -log_probs * weights)
            np.add.at(counts, owner, weights)
            at += len(batch.ids)
    return sums, counts


def _runs(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive places whose sizes add up to at most `budget`; a size over it stands alone."""
    runs: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(place)
        room -= size
    return runs


def _per_token(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean log-likelihoods, so that long answers are not at a disadvantage."""
    return -sums / np.maximum(counts, 1)


def _prompt(model: Model, prompting: Prompting, item: Item) -> np.ndarray:
    turns = prompting.messages(item)
    return np.array(prompt_tokens(turns, model.tokenizer, item.tools) if turns else [], dtype=np.int64)


def _answered(model: Model, prompting: Prompting, item: Item, answer: str) -> Example:
    """The item's prompt with `answer` as the only scored turn; without a prompt, `answer` as plain text."""
    if not item.prompt:
        text = Conversation(messages=(), text=answer, id=item.id, source=item.id)
        return render(text, model.tokenizer, model.eos_ids)[0]
    turns = (*prompting.messages(item), Message(role="assistant", content=answer))
    row = Conversation(messages=turns, id=f"{item.id}:{answer}", source=item.id, tools=item.tools)
    return render_last(row, model.tokenizer, model.eos_ids)
