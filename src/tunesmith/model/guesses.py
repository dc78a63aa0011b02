"""Guesses of what a row says next, which cost little where one more token in a pass costs little.

Answers repeat what stands in their prompts and in each other. What followed the last two tokens, or else the last one,
when they stood somewhere before, is guessed to follow again. A pass over a row's last token and its guesses draws a
token after each; those after the first wrong guess are thrown away (prompt lookup: Saxena 2023; Leviathan et al. 2023,
arXiv 2211.17192). A token is drawn with its own random number, guessed or not, so guesses change no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

MOST_PAIRS = 1_000_000  # remembered at most


class Guesses:
    """What followed each token, and each two, when they were last seen."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}

    def learn(self, tokens: Sequence[int], new: int) -> None:
        """Remember what the last `new` of `tokens` followed."""
        if len(self.after) > MOST_PAIRS:
            self.after.clear()
        for place in range(max(1, len(tokens) - new), len(tokens)):
            self.after[(tokens[place - 1],)] = tokens[place]
            if place > 1:
                self.after[tokens[place - 2], tokens[place - 1]] = tokens[place]

    def guess(self, last: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens to follow the `last` two."""
        return list(islice(self._following(*last), most))

    def _following(self, before: int, last: int) -> Iterator[int]:
        while (found := self.after.get((before, last), self.after.get((last,)))) is not None:
            yield found
            before, last = last, found
