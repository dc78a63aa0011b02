"""Sentiment of an answer by the lexicon of Hutto and Gilbert 2014 (ICWSM): words rated by people, and a few rules.

Metric `lexicon.py:sentiment`, for judging only: nothing is ever trained on it. Needs: pip install tunesmith[demo]
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tunesmith.types import Item

_ANALYZER = SentimentIntensityAnalyzer()


def sentiment(answer: str, item: Item) -> float:
    """From -1 (most negative) to 1 (most positive)."""
    return _ANALYZER.polarity_scores(answer)["compound"]
