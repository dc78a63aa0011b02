"""How a text begins that no chat template begins: as the model's own tokenizer begins it.

Some bases read a token for the beginning before every text in their training (Llama, Mistral, Gemma) and expect it;
others never saw one there (GPT-2, Qwen, SmolLM2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=4)
def beginning(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """The token that the tokenizer puts before a text, as a list of one; empty where it puts none."""
    bos, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]  # of no text only the end might be left
    return (bos,) if bos is not None and ids[0] == bos else ()  # type: ignore[index]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text of its own with its beginning, which a text that spells it has already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    begins = list(beginning(tokenizer))
    return ids if ids[:1] == begins else begins + ids
