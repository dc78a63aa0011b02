"""Look at what is trained: a row's tokens with the trained ones in colour, before the first step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..types import Example

TRAINED, CONTEXT = "bold green", "dim"


def masked_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The row as text: trained tokens green, context dim, line ends kept and special tokens shown.

    Runs of equal colour are decoded together, so that characters of several tokens stay whole.
    """
    text = Text()
    trained = example.weights > 0
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    for start, end in pairwise(edges):
        part = str(tokenizer.decode(example.tokens[start:end].tolist(), skip_special_tokens=False))
        text.append(part, style=TRAINED if trained[start] else CONTEXT)
    return text
