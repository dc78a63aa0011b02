"""The systems that are compared, as prompts: the base alone, with instructions, with instructions and shots, tuned.

A prompted arm says what to send for an item. The tuned model gets the item's own prompt and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.render import prompt_tokens
from ..data.store import some
from ..types import Conversation, Item, Message

Placement = Literal["system", "user"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompting:
    """Instructions, where they stand, and examples shown as earlier turns."""

    name: str
    instructions: str = ""
    placement: Placement = "system"
    shots: tuple[Conversation, ...] = ()

    def messages(self, item: Item) -> tuple[Message, ...]:
        """The turns sent for `item`."""
        turns = item.prompt
        system = [message for message in turns[:1] if message.role == "system"]
        asked = [tuple(m for m in shot.messages if m.role != "system") for shot in self.shots] + [turns[len(system) :]]
        if self.instructions and self.placement == "user":
            asked = [_instructed(part, self.instructions) for part in asked]
        rest = tuple(message for part in asked for message in part)
        if self.instructions and self.placement == "system":
            text = "\n\n".join([self.instructions.strip(), *(message.content for message in system)])
            return (Message(role="system", content=text), *rest)
        return (*system, *rest)


def candidates(
    instructions: str, shots: int, train: Sequence[Conversation], *, seed: int, allow_system: bool
) -> list[Prompting]:
    """Prompted arms to choose from on validation rows: placements of the instructions, numbers and draws of shots."""
    asking = (place for place, row in enumerate(train) if row.messages)  # plain text asks nothing
    train = some(train, asking if shots else ())
    placements: list[Placement] = ["system", "user"] if allow_system else ["user"]
    found = [Prompting(name="instructed", instructions=instructions, placement=p) for p in placements if instructions]
    counts = sorted({count for count in (1, shots // 2 + 1, shots) if 0 < count <= min(shots, len(train))})
    for count in counts:
        for draw in range(2 if count == counts[-1] else 1):
            shown = _draw(train, count, seed + draw)
            found.append(Prompting(name="few_shot", instructions=instructions, placement=placements[0], shots=shown))
    return found


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for a system message."""
    turns = [Message(role="system", content="kedgeree"), Message(role="user", content="hello")]
    try:
        return "kedgeree" in tokenizer.decode(prompt_tokens(turns, tokenizer))
    except (jinja2.TemplateError, TypeError, KeyError):
        return False


def _draw(train: Sequence[Conversation], count: int, seed: int) -> tuple[Conversation, ...]:
    places = np.random.Generator(np.random.Philox(key=[seed, count])).choice(len(train), size=count, replace=False)
    return tuple(train[int(place)] for place in places)


def _instructed(turns: tuple[Message, ...], instructions: str) -> tuple[Message, ...]:
    """The turns of one conversation with the instructions before what its user says first."""
    place = next((place for place, message in enumerate(turns) if message.role == "user"), None)
    if place is None:
        return turns
    told = Message(role="user", content=f"{instructions.strip()}\n\n{turns[place].content}")
    return (*turns[:place], told, *turns[place + 1 :])
