"""Rows that write out a special token, such as `<|im_end|>`: the tokenizer makes it that token, wherever it stands.

Who writes it ends a turn, or begins one in another's name, in training as when the model is asked. Some rows mean it,
so they are kept and flagged. Plain text has no turns to be broken, and is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ..types import Comparison, LedgerEntry, Message, Row
from .render import as_turn, encode

SPELLED = "special token in the text"


def spelled(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[LedgerEntry]:
    """A flag for each row with a turn that spells a special token of this tokenizer; it names token and turn."""
    for row in rows:
        turns = (*row.prompt, row.chosen, row.rejected) if isinstance(row, Comparison) else row.messages
        found = dict.fromkeys(f"{token} of {turn.role}" for turn in turns for token in _tokens(turn, tokenizer))
        if found:
            detail = ", ".join(found)
            yield LedgerEntry(source=row.source, id=row.id, action="flagged", reason=SPELLED, detail=detail)


def _tokens(turn: Message, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    special = _special(tokenizer)
    text = "\n".join([turn.content, *(str(call) for call in as_turn(turn).get("tool_calls", ()))])
    seen = dict.fromkeys(_pattern(tokenizer).findall(text))
    ids = set(encode(tokenizer, text)) if seen else set[int]()
    return [token for token in seen if special[token] in ids]


@lru_cache(maxsize=4)
def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(_special(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@lru_cache(maxsize=4)
def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens and their ids; of other added ones, such as `<tool_call>`, text may hold what it likes."""
    return {token.content: place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
