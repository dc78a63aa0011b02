"""Tokens become text as they are drawn: never half a character, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what a tokenizer shows for bytes that are not a character, or not one yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A drawn token as a client sees it: its log-probability in nats, and its likeliest rivals with theirs.

    `start` is where its text begins in the answer.
    """

    token: int
    log_prob: float
    rivals: tuple[tuple[int, float], ...] = ()
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What may be shown now: a piece of the answer, and the words whose text begins in it."""

    text: str = ""
    words: tuple[Word, ...] = ()


class Speaker:
    """One answer's text. The pieces of `say` and the last one of `finish` join to the decoded answer, up to a stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.context = self.read = 0  # text of tokens[:read] is in `text`; tokens[context:] are decoded again
        self.text = ""
        self.shown = 0
        self.hidden: list[Word] = []
        self.stopped = False

    def say(self, token: int, log_prob: float, rivals: Sequence[tuple[int, float]] = ()) -> Said:
        """Take one more token and return what became certain. Sets `stopped` when a stop string is complete."""
        self.hidden.append(Word(token=token, log_prob=log_prob, rivals=tuple(rivals), start=len(self.text)))
        self.tokens.append(token)
        before = self._decode(self.tokens[self.context : self.read])
        now = self._decode(self.tokens[self.context :])
        if len(now) > len(before) and not now.endswith(HALF):
            self.text += now[len(before) :]
            self.context, self.read = self.read, len(self.tokens)
        held_back = self._may_stop()
        return self._released(len(self.text) - held_back)

    def finish(self) -> Said:
        """What was still held back when the answer ended."""
        if self.stopped:
            return Said()
        before = self._decode(self.tokens[self.context : self.read])
        self.text += self._decode(self.tokens[self.context :])[len(before) :]
        self._may_stop(ended=True)
        return self._released(len(self.text), ended=not self.stopped)

    def _may_stop(self, *, ended: bool = False) -> int:
        """How many characters at the end of the text may not be shown; cuts the text at the first stop string in it."""
        places = [place for stop in self.stops if (place := self.text.find(stop, self.shown)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        if places or ended:
            return 0
        longest = max(map(len, self.stops), default=1) - 1
        tail = self.text[max(self.shown, len(self.text) - longest) :] if longest else ""
        starts = (n for n in range(len(tail)) if any(stop.startswith(tail[n:]) for stop in self.stops))
        return len(tail) - next(starts, len(tail))

    def _released(self, end: int, *, ended: bool = False) -> Said:
        text, self.shown = self.text[self.shown : end], max(self.shown, end)
        out = [word for word in self.hidden if ended or word.start < end]
        self.hidden = self.hidden[len(out) :]
        return Said(text=text, words=tuple(out))

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
