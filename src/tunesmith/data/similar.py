"""Which rows say nearly the same: MinHash finds candidates, exact Jaccard similarity decides.

Two rows are near-duplicates when their prompts and, separately, their completions share enough word 3-grams. Judging
the sides apart keeps different questions with one canned answer, and one question with different answers, distinct. A
comparison has three sides: prompt, chosen and rejected answer.
Shingles that a large part of the rows share (a fixed instruction, a letter's closing) are boilerplate: they must match
too, but they cannot make two rows alike by themselves.

MinHash: Broder 1997. Banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from unicodedata import normalize

import numpy as np
from jaxtyping import UInt32, UInt64

from ..errors import RecipeError
from ..types import Comparison, Message, Row
from .store import Codec, Places, Stored, View, digest

Shingles = UInt64[np.ndarray, "_"]

# Words, with a leading minus (-1, -l) and without the punctuation of sentences, whatever their script, or marks that
# nobody sees (zero-width, direction); scripts without spaces count character by character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]"
    r"|-?[^\W\u3040-\u30ff\u3400-\u9fff]+"
    r"|[^\w\s.,;:!?'\"()\-\u2013\u2014\u2026\u2018-\u201d\u00a1\u00ab\u00bb\u00bf\u060c\u061b\u061f\u0964\u200b-\u200f\ufeff"
    r"\u3001\u3002\u300c-\u300f\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f]"
)
_WORDS_PER_SHINGLE = 3
# A shingle in more rows than both of these is boilerplate, so up to 20 copies of one row are always seen as such.
_BOILERPLATE_ROWS = 20
_BOILERPLATE_SHARE = 0.2
_SIDES = 3
_FLIPS = (np.uint64(0), np.uint64(0xFFFFFFFF), np.uint64(0x55555555))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / 1.618..., odd
_BUCKETS = 1 << 18
_KEPT_ROWS = 10_000  # whose sides are in memory while pairs are compared
_LOWEST = 0.5
_MISSED = 1e-4
MANY_ROWS = 100_000
MOST_COMPARED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A row's prompt or one of its answers as sorted shingles: all of them, and those that are not boilerplate."""

    all: Shingles
    telling: Shingles


def near_pairs(rows: Sequence[Row], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of positions whose prompts and answers all reach `threshold` similarity.

    Every pair is verified; a true pair is missed with a probability under 1e-4. `threshold` 1 yields nothing. Words are
    on disk; memory is about 100 bytes a row. Among more than MANY_ROWS rows, a row is compared with the
    MOST_COMPARED before it in each band, so that a million rows of one template end in hours, not years. Rows that are
    equal but for punctuation and case are paired with the first of them only, or with the first of each rater.
    Raises RecipeError for a threshold under 0.5.
    """
    if threshold >= 1 or len(rows) < 2:
        return
    if threshold < _LOWEST:
        fix = f"Use {_LOWEST} to 1; 1 turns it off."
        raise RecipeError(f"near_duplicates = {threshold} would join unrelated rows", where="data", fix=fix)
    sides = _sides(rows)
    first_of, firsts = Places(), array("q")
    for index, row in enumerate(rows):
        rater = row.rater if isinstance(row, Comparison) else ""
        first = first_of.setdefault(rater.encode() + b"\0" + _to_bytes([side.all for side in sides[index]]), index)
        if first == index:
            firsts.append(index)
        else:
            yield first, index
    for earlier, later in _candidates(firsts, sides, threshold):
        if all(_alike(a, b, threshold) for a, b in zip(sides[earlier], sides[later], strict=True)):
            yield earlier, later


def folded(text: str) -> str:
    """A text without case and punctuation; as it stands, but for spaces at its ends, where it has no words."""
    return " ".join(_words(text)) or text.strip()


def _words(text: str) -> list[str]:
    """A letter and its accent are one character or two, as the keyboard has it; NFC makes them one."""
    return _WORD.findall(normalize("NFC", text).casefold())


def row_texts(row: Row) -> tuple[str, str, str]:
    """The sides that are judged apart: what a row asks, what it answers, and the rejected answer of a comparison."""
    asked = "\n".join(_spoken(message) for message in row.prompt)
    if isinstance(row, Comparison):
        return asked, _spoken(row.chosen), _spoken(row.rejected)
    return asked, _spoken(row.messages[-1]) if row.messages else row.text, ""


def jaccard(a: Shingles, b: Shingles) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _alike(a: Side, b: Side, threshold: float) -> bool:
    return jaccard(a.telling, b.telling) >= threshold and jaccard(a.all, b.all) >= threshold


def _sides(rows: Sequence[Row]) -> View[tuple[Side, ...]]:
    """The sides of each row; their shingles are on disk."""
    shingles = Stored(Codec(_to_bytes, _from_bytes), ([_shingles(text) for text in row_texts(row)] for row in rows))
    boilerplate = _boilerplate(shingles)

    @lru_cache(maxsize=_KEPT_ROWS)
    def sides(place: int) -> tuple[Side, ...]:
        return tuple(_side(all_, common) for all_, common in zip(shingles[place], boilerplate, strict=True))

    return View(sides, range(len(shingles)))


def _side(all_: Shingles, boilerplate: Shingles) -> Side:
    telling = all_[~np.isin(all_, boilerplate, assume_unique=True)] if len(boilerplate) else all_
    return Side(all=all_, telling=telling if len(telling) else all_)


def _boilerplate(shingles: Sequence[Sequence[Shingles]]) -> list[Shingles]:
    """For each side the shingles of too many rows: counted by bucket, then one by one where the bucket is full."""
    limit = max(_BOILERPLATE_ROWS, _BOILERPLATE_SHARE * len(shingles))
    in_bucket = np.zeros((_SIDES, _BUCKETS), dtype=np.int64)
    for row in shingles:
        for counts, values in zip(in_bucket, row, strict=True):
            np.add.at(counts, values % np.uint64(_BUCKETS), 1)
    rows_with = [Counter[int]() for _ in range(_SIDES)]
    for row in shingles:
        for found, counts, values in zip(rows_with, in_bucket, row, strict=True):
            found.update(values[counts[values % np.uint64(_BUCKETS)] > limit].tolist())
    return [np.array([value for value, n in found.items() if n > limit], dtype=np.uint64) for found in rows_with]


def _to_bytes(sides: Sequence[Shingles]) -> bytes:
    return np.concatenate([np.array([len(values) for values in sides], dtype=np.uint64), *sides]).tobytes()


def _from_bytes(data: bytes) -> list[Shingles]:
    values = np.frombuffer(data, dtype=np.uint64)
    ends = [_SIDES, *(_SIDES + np.cumsum(values[:_SIDES]).astype(np.int64)).tolist()]
    return [values[start:end] for start, end in pairwise(ends)]


def _shingles(text: str) -> Shingles:
    """Sorted distinct 64-bit hashes of a text's word 3-grams; a shorter text is one shingle, an empty one none."""
    hashes = np.array([_word_hash(word) for word in _words(text)], dtype=np.uint64)
    if not len(hashes):
        return hashes
    count = max(1, len(hashes) - _WORDS_PER_SHINGLE + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(min(_WORDS_PER_SHINGLE, len(hashes))):
        # Multiplying between additions makes the order of the words count.
        mixed = (mixed + hashes[offset : offset + count]) * _GOLDEN
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return digest(word)


def _candidates(places: Sequence[int], sides: Sequence[Sequence[Side]], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs that share a band of their MinHash signatures over the shingles of all sides together.

    When every side reaches the threshold so does their disjoint union, so that one signature serves all.
    """
    from datasketch import MinHash

    # A band of r rows matches with probability s**r; b bands miss a pair of similarity s with (1 - s**r)**b.
    rows_per_band = min(32, max(1, int(math.log(0.55) / math.log(threshold))))
    bands = math.ceil(math.log(_MISSED) / math.log(1 - threshold**rows_per_band))
    blank = MinHash(num_perm=bands * rows_per_band, hashfunc=int)
    powers = np.cumprod(np.full(rows_per_band, _GOLDEN))
    keys = np.empty((bands, len(places)), dtype=np.uint32)
    for column, place in enumerate(places):
        signature = blank.copy()
        # Each side's bits are flipped its own way, so that the same words on different sides are different shingles.
        marked = [side.telling ^ flip for side, flip in zip(sides[place], _FLIPS, strict=True)]
        signature.update_batch((np.concatenate(marked) & np.uint64(0xFFFFFFFF)).tolist())
        by_band = (signature.hashvalues.reshape(bands, rows_per_band) * powers).sum(axis=1)
        keys[:, column] = (by_band * _GOLDEN) >> np.uint64(32)
    for earlier, later in _sharing(keys, len(places) if len(places) <= MANY_ROWS else MOST_COMPARED):
        yield places[earlier], places[later]


def _sharing(keys: UInt32[np.ndarray, "bands rows"], most: int) -> Iterator[tuple[int, int]]:
    """Pairs of columns that are equal in a band, each pair once; in a band a column meets the `most` before it."""
    for band, row in enumerate(keys):
        order = np.argsort(row, kind="stable")
        ordered = row[order]
        for at in np.flatnonzero(ordered[1:] == ordered[:-1]) + 1:
            later = order[at]
            for earlier in order[max(0, at - most) : at][::-1]:
                if row[earlier] != row[later]:
                    break
                if not (keys[:band, earlier] == keys[:band, later]).any():
                    yield int(earlier), int(later)


def _spoken(message: Message) -> str:
    return " ".join([message.content, *(str(dict(call)) for call in message.tool_calls)])
