"""Sentences that people rated from -4 (most negative) to 4 (most positive): rows to learn from choices and rewards.

    sentiment_pairs       two sentences of one kind, the one rated positive over the one rated negative
    sentiment_sentences   one sentence of a kind, positive or negative, to imitate
    sentiment_labels      is this sentence positive or negative? an answer that a line of code can check

Three kinds: movie reviews, product reviews, tweets. The task is the sentiment task of Ziegler et al. 2019 (arXiv
1909.08593), with people's ratings in place of a classifier. Ratings: Hutto and Gilbert 2014, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM), each the mean of 15 to 99 people's, in the sdist
vaderSentiment 0.5 (MIT). It was written for Python 2 and cannot be installed, so it is only read.

The first two have three prompts, which fractions of rows would share. So a sentence belongs to one part, by its words:
NAME is for training, NAME/valid and NAME/test are the others. Within a part a sentence stands in one pair only, so that
any two disjoint sets of pairs share no sentence.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import DataError
from ..types import Comparison, Conversation, Message
from .fetch import fetch
from .layout import comparison_id, content_id, plain_row

# The part of all sentences that each is.
PARTS = {"train": 0.86, "valid": 0.06, "test": 0.08}
SMALLEST_GAP = 1.6
_CLEAR_RATING = 0.5  # of a sentence to imitate
_PLAIN_RATING = 1.0  # of a sentence that has one right label
_WORDS = range(4, 61)

_QUESTION = "Is this sentence positive or negative? Answer with one word."

_SDIST = "vaderSentiment-0.5.zip"
_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/{}_GroundTruth.txt"
# The table's name, what a sentence of it is called, and the prompt.
_KINDS = (
    ("movieReviewSnippets", "movie review", "Write one sentence from a movie review."),
    ("amazonReviewSnippets", "product review", "Write one sentence from a customer's product review."),
    ("tweets", "tweet", "Write a short tweet."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence and the mean of its ratings, -4 to 4."""

    text: str
    rating: float
    kind: str
    prompt: str


def sentiment_pairs(part: str, rows: int | None, seed: int) -> Iterator[Comparison]:
    """Pairs of one part, all or `rows` of them; `extra` holds the gap between the ratings and the kind.

    Raises DataError when the ratings cannot be had.
    """
    return islice(pairs(in_part(_fetched(), part, seed), part, seed), rows)


def sentiment_sentences(part: str, rows: int | None, seed: int) -> Iterator[Conversation]:
    """Sentences of one part, positive and negative mixed; `extra` holds rating and kind. Raises as sentiment_pairs."""
    clear = (sentence for sentence in in_part(_fetched(), part, seed) if abs(sentence.rating) >= _CLEAR_RATING)
    for number, sentence in enumerate(islice(clear, rows), start=1):
        extra = {"rating": sentence.rating, "kind": sentence.kind}
        yield plain_row(sentence.prompt, sentence.text, _source("sentiment_sentences", part, number), extra)


def sentiment_labels(part: str, rows: int | None, seed: int) -> Iterator[Conversation]:
    """Questions about the sentences of one part and the labels positive or negative; else as sentiment_sentences."""
    plain = (sentence for sentence in in_part(_fetched(), part, seed) if abs(sentence.rating) >= _PLAIN_RATING)
    for number, sentence in enumerate(islice(plain, rows), start=1):
        label = "positive" if sentence.rating > 0 else "negative"
        extra = {"rating": sentence.rating, "kind": sentence.kind}
        yield plain_row(f"{_QUESTION}\n\n{sentence.text}", label, _source("sentiment_labels", part, number), extra)


def pairs(sentences: Sequence[Sentence], part: str, seed: int) -> Iterator[Comparison]:
    """Each positive sentence, in order, over the next negative one of its kind; pairs with a small gap are left out."""
    found = []
    for _, kind, _ in _KINDS:
        positive = [sentence for sentence in sentences if sentence.kind == kind and sentence.rating > 0]
        negative = [sentence for sentence in sentences if sentence.kind == kind and sentence.rating < 0]
        wide = [(a, b) for a, b in zip(positive, negative, strict=False) if a.rating - b.rating >= SMALLEST_GAP]
        found += wide
    for number, (better, worse) in enumerate(sorted(found, key=lambda pair: _order(pair[0], seed)), start=1):
        prompt = (Message(role="user", content=better.prompt),)
        chosen, rejected = (Message(role="assistant", content=sentence.text) for sentence in (better, worse))
        yield Comparison(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            id=comparison_id(prompt, chosen, rejected),
            source=_source("sentiment_pairs", part, number),
            extra={"gap": round(better.rating - worse.rating, 3), "kind": better.kind},
        )


def in_part(sentences: Iterable[Sentence], part: str, seed: int) -> list[Sentence]:
    """The sentences of a part, in an order that depends on their words and the seed alone."""
    names = list(PARTS)
    ends = [sum(PARTS[name] for name in names[: place + 1]) for place in range(len(names))]
    here = []
    for sentence in sentences:
        draw = int(content_id("part", seed, _words(sentence.text)), 16) / 2**64
        if next((name for name, end in zip(names, ends, strict=True) if draw < end), names[-1]) == part:
            here.append(sentence)
    return sorted(here, key=lambda sentence: _order(sentence, seed))


def read_sentences(sdist: Path) -> list[Sentence]:
    """The clean sentences of the sdist, none twice: 4 to 60 words, no control characters, addresses or names removed.

    Raises DataError when the file is not that sdist.
    """
    found: dict[str, Sentence] = {}
    try:
        with zipfile.ZipFile(sdist) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(_ARCHIVE))) as archive:
            for table, kind, prompt in _KINDS:
                file = archive.extractfile(_TABLE.format(table))
                lines = (file.read() if file else b"").decode("utf-8-sig").splitlines()
                for _, rating, given in (line.split("\t") for line in lines):
                    text = " ".join(html.unescape(given).split())
                    if _clean(text):
                        sentence = Sentence(text=text, rating=float(rating), kind=kind, prompt=prompt)
                        found.setdefault(_words(text), sentence)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        fix = "Delete it and run again; it is downloaded anew."
        raise DataError(f"does not hold the ratings ({error})", where=str(sdist), fix=fix) from None
    return list(found.values())


def _fetched() -> list[Sentence]:
    return read_sentences(fetch("vaderSentiment", _SDIST, _SHA256))


def _clean(text: str) -> bool:
    # Tweets had names and addresses replaced by placeholders, which are nothing to learn.
    return len(text.split()) in _WORDS and text.isprintable() and "@" not in text and "http" not in text


def _words(text: str) -> str:
    """The sentence without case and punctuation: two spellings of one sentence are the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _order(sentence: Sentence, seed: int) -> str:
    return content_id("order", seed, sentence.text)


def _source(name: str, part: str, number: int) -> str:
    return f"builtin:{name}:{number}" if part == "train" else f"builtin:{name}/{part}:{number}"
