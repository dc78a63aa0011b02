"""What tuning cost in general ability: loss on general prose, distance from the base, and multiple choice if given.

The default needs no download: prose from the standard library's language reference (`pydoc_data.topics`) and a dozen
everyday questions. Every number is paired by text with the base model's.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from ..data.pack import pack_one
from ..data.render import prompt_tokens
from ..model.load import Model
from ..model.sample import Sampling, sample
from ..model.score import all_log_probs, hidden_states
from ..texts import text_tokens
from ..types import Example, Item, Message
from .measure import choice_accuracies, example_losses
from .systems import Prompting

TEXTS, TEXT_TOKENS, ANSWER_TOKENS = 48, 128, 24
LONGEST_TOKEN_CHARACTERS = 16  # on average; the rest of a long text need not be tokenised
NEUTRAL_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short message thanking a colleague for their help.",
    "What are three things to check before a long car journey?",
    "Summarise the story of Cinderella in one sentence.",
    "How do I boil an egg?",
    "Name the capital of Japan and one thing it is known for.",
    "Give me a polite way to decline an invitation to dinner.",
    "What is the difference between weather and climate?",
    "Write a four-line poem about autumn.",
    "Translate 'good morning' into French and Spanish.",
    "If a train leaves at 3 pm and travels for two hours, when does it arrive?",
    "Why do we need sleep?",
    "Suggest a name for a small bakery.",
    "What does a carpenter do?",
    "List the primary colours.",
    "Tell me a fact about the ocean.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class General:
    """General ability of one model: loss per text (nats per token) and correctness per retention item."""

    losses: Float[np.ndarray, "N"]
    correct: Float[np.ndarray, "M"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What is kept of the base, to hold tuned models against: its ability, and its distributions over its answers."""

    general: General
    retention: Sequence[Item]
    answers: Sequence[Example]
    distributions: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """General ability of one tuned model beside its base, item by item; `kl` is per neutral question, in nats."""

    before: General
    after: General
    kl: np.ndarray


def remember(base: Model, retention: Sequence[Item]) -> Remembered:
    """Measure the base before it is tuned; `retention` are multiple-choice items, perhaps none."""
    answers = neutral_answers(base)
    return Remembered(
        general=general_ability(base, retention),
        retention=retention,
        answers=answers,
        distributions=distributions(base, answers),
    )


def forgotten(before: Remembered, tuned: Model) -> Forgetting:
    """The same measures of a tuned model, paired with its base's."""
    return Forgetting(
        before=before.general,
        after=general_ability(tuned, before.retention),
        kl=kl_from_base(before.distributions, distributions(tuned, before.answers)),
    )


def general_texts(model: Model) -> list[Example]:
    """Equal pieces of general prose, each long enough to carry a context."""
    topics = pydoc_data.topics.topics
    examples = []
    for name in sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[:TEXTS]:
        text = " ".join(topics[name].split())[: TEXT_TOKENS * LONGEST_TOKEN_CHARACTERS]
        ids = text_tokens(model.tokenizer, text)[:TEXT_TOKENS]
        weights = np.array([0.0] + [1.0] * (len(ids) - 1), dtype=np.float32)
        examples.append(Example(tokens=np.array(ids, dtype=np.int64), weights=weights, id=name))
    return examples


def general_ability(model: Model, retention: Sequence[Item]) -> General:
    """Loss on general prose, and multiple choice on `retention` (may be empty)."""
    sums, counts = example_losses(model, general_texts(model))
    asked = Prompting(name="retention")
    correct = choice_accuracies(model, asked, retention) if retention else np.zeros(0)
    return General(losses=sums / np.maximum(counts, 1), correct=correct)


def neutral_answers(base: Model) -> list[Example]:
    """The base model's own greedy answers to everyday questions; their tokens are where KL is measured."""
    prompts = [
        np.array(prompt_tokens([Message(role="user", content=text)], base.tokenizer)) for text in NEUTRAL_PROMPTS
    ]
    answers = sample(base, prompts, Sampling(max_new_tokens=ANSWER_TOKENS))
    return [
        Example(
            tokens=np.concatenate([prompt, answer.tokens]),
            weights=np.array([0.0] * len(prompt) + [1.0] * len(answer.tokens), dtype=np.float32),
            id=text,
        )
        for prompt, answer, text in zip(prompts, answers, NEUTRAL_PROMPTS, strict=True)
    ]


@torch.no_grad()
def distributions(model: Model, answers: Sequence[Example]) -> list[torch.Tensor]:
    """Log-probabilities of the whole vocabulary at each answer token, one [T V] tensor per answer."""
    found = []
    for example in answers:
        batch = pack_one([example], share=False).to(model.device)
        if model.packs:
            found.append(all_log_probs(hidden_states(model, batch), model.head_weight).cpu())
        else:
            logits = model.hf(batch.tokens[None], use_cache=False).logits[0].index_select(0, batch.index)
            found.append(torch.log_softmax(logits.float(), -1).cpu())
    return found


def kl_from_base(base: Sequence[torch.Tensor], tuned: Sequence[torch.Tensor]) -> np.ndarray:
    """Mean KL(base || tuned) per answer token of each question, in nats."""
    return np.array([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(base, tuned, strict=True)])
