"""The nouns of text and results. Numpy only, so that `--help`, reports and labelling start without torch.

Axis letters used in every signature of the package:
    T  tokens of one example        P  tokens of a prompt       S  scored tokens of a batch
    N  items of a task              V  vocabulary               D  hidden width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Role = Literal["system", "user", "assistant", "tool"]
Action = Literal["dropped", "cut", "flagged"]
Decision = Literal["ship", "do not ship", "not shown"]
Sameness = Literal["equivalent", "at least as good", "worse", "not shown"]

UNENDED = "unended"  # the score that is 1 where the limit of tokens ended an answer
UNSCORED = "unscored"  # the score that is 1 where the user's reward function gave none
FEWEST_ROWS = 10  # of a verdict: below 6 the exact test cannot reach p < 0.05, and a handful is no sample of anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, as chat templates read it."""

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A row to imitate: turns whose assistant messages are trained, or (`text` set) plain text trained throughout.

    `id` is a hash of the content: it decides the split and names the row in every file of the run folder.
    `source` is `file:line` (1-based), for messages to the user.
    """

    messages: tuple[Message, ...]
    id: str
    source: str
    tools: tuple[Mapping[str, object], ...] = ()
    text: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant turn: what is served to the model."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        """The last assistant turn, or the whole text of a plain-text row."""
        return self.messages[-1].content if self.messages else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A person's choice between two answers to one prompt."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    id: str
    source: str
    rater: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)


Row = Conversation | Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """Why one row was dropped, cut or flagged. Written to `ledger.jsonl`; nothing happens to a row without one."""

    source: str
    id: str
    action: Action
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One held-out question: a prompt, the reference answer, and what a metric may want besides."""

    prompt: tuple[Message, ...]
    reference: str
    id: str
    choices: tuple[str, ...] = ()
    tools: tuple[Mapping[str, object], ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)


Grade = Callable[[Sequence[Item], Sequence[str]], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Tokens plus numbers per token, unshifted: `weights[t]` says how much predicting `tokens[t]` counts."""

    tokens: Int[np.ndarray, "T"]
    weights: Float[np.ndarray, "T"]
    id: str
    extra: Mapping[str, Float[np.ndarray, "T"]] = field(default_factory=dict)


Stop = Literal["end_of_turn", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A sampled answer: its token ids (end of turn included), their log-probabilities in nats, and why it ended."""

    tokens: Int[np.ndarray, "T"]
    log_probs: Float[np.ndarray, "T"]
    text: str
    stop: Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval; never a number without one. `n` counts the items it rests on."""

    value: float
    low: float
    high: float
    n: int
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Paired difference `a - b` of one metric on the same items."""

    a: str
    b: str
    metric: str
    difference: Estimate
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """Whether a does as well as b: the interval of `a - b` (level 1 - 2 alpha) against a margin stated beforehand."""

    a: str
    b: str
    metric: str
    margin: float
    difference: Estimate
    finding: Sameness


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision that the run supports and the sentences that say why."""

    decision: Decision
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One arm's scores on a task: per metric one number per item, and what answering cost."""

    arm: str
    ids: tuple[str, ...]
    answers: tuple[str, ...]
    scores: Mapping[str, Float[np.ndarray, "N"]]
    prompt_tokens: Int[np.ndarray, "N"]
    completion_tokens: Int[np.ndarray, "N"]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """One value that the run filled in, and why."""

    key: str
    value: float | int | str
    reason: str
