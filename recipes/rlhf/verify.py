"""A reward that is known, not learnt, for builtin:sentiment_labels: reward `verify.py:correct`."""

import re

from tunesmith.types import Item


def correct(answer: str, item: Item) -> float:
    """1 if the first label that the answer names is the reference, else 0."""
    named = re.search("positive|negative", answer.lower())
    return float(named is not None and named[0] == item.reference)
