"""Which rows say nearly the same: MinHash finds candidates, exact Jaccard similarity decides.

Two rows are near-duplicates when their prompts and, separately, their completions share enough word 3-grams. Judging
the two sides apart keeps different questions with one canned answer, and one question with different answers, distinct.
Shingles that a large part of the rows share (a fixed instruction, a letter's closing) are boilerplate: they must match
too, but they cannot make two rows alike by themselves.

MinHash: Broder 1997. Banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import UInt64

from ..errors import RecipeError
from ..types import Comparison, Message, Row

Shingles = UInt64[np.ndarray, "_"]

# Words, with a leading minus (-1, -l) and without punctuation; scripts without spaces count character by character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]"
    r"|-?[^\W\u3040-\u30ff\u3400-\u9fff]+"
    r"|[^\w\s.,;:!?'\"()\-\u2013\u2014\u2026\u2018-\u201d]"
)
_WORDS_PER_SHINGLE = 3
# A shingle in more rows than both of these is boilerplate, so up to 20 copies of one row are always seen as such.
_BOILERPLATE_ROWS = 20
_BOILERPLATE_SHARE = 0.2
_LOWEST = 0.5
_MISSED = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A row's prompt or completion as sorted shingles: all of them, and those that are not boilerplate."""

    all: Shingles
    telling: Shingles


def near_pairs(rows: Sequence[Row], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of positions whose prompts and completions both reach `threshold` similarity.

    Every pair is verified; a true pair is missed with a probability under 1e-4. `threshold` 1 yields nothing. Memory:
    about 16 bytes a word. Rows that are equal but for punctuation and case are paired with the first of them only.
    Raises RecipeError for a threshold under 0.5.
    """
    if threshold >= 1 or len(rows) < 2:
        return
    if threshold < _LOWEST:
        fix = f"Use {_LOWEST} to 1; 1 turns it off."
        raise RecipeError(f"near_duplicates = {threshold} would join unrelated rows", where="data", fix=fix)
    prompts, completions = _sides([row_prompt(row) for row in rows]), _sides([row_completion(row) for row in rows])
    first_of: dict[tuple[bytes, bytes], int] = {}
    firsts = []
    for index in range(len(rows)):
        first = first_of.setdefault((prompts[index].all.tobytes(), completions[index].all.tobytes()), index)
        if first == index:
            firsts.append(index)
        else:
            yield first, index
    for earlier, later in _candidates(firsts, prompts, completions, threshold):
        if _alike(prompts[earlier], prompts[later], threshold) and _alike(
            completions[earlier], completions[later], threshold
        ):
            yield earlier, later


def row_prompt(row: Row) -> str:
    """What a row asks, as one text; a plain-text row asks nothing."""
    return "\n".join(_spoken(message) for message in row.prompt)


def row_completion(row: Row) -> str:
    """What a row answers, as one text; of a comparison, both answers."""
    if isinstance(row, Comparison):
        return f"{_spoken(row.chosen)}\n{_spoken(row.rejected)}"
    return _spoken(row.messages[-1]) if row.messages else row.text


def jaccard(a: Shingles, b: Shingles) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _alike(a: Side, b: Side, threshold: float) -> bool:
    return jaccard(a.telling, b.telling) >= threshold and jaccard(a.all, b.all) >= threshold


def _sides(texts: Sequence[str]) -> list[Side]:
    shingles = _shingles(texts)
    values, counts = np.unique(np.concatenate(shingles), return_counts=True)
    boilerplate = values[counts > max(_BOILERPLATE_ROWS, _BOILERPLATE_SHARE * len(texts))]
    sides = []
    for all_ in shingles:
        telling = all_[~np.isin(all_, boilerplate, assume_unique=True)] if len(boilerplate) else all_
        sides.append(Side(all=all_, telling=telling if len(telling) else all_))
    return sides


def _shingles(texts: Sequence[str]) -> list[Shingles]:
    """Sorted distinct 64-bit hashes of each text's word 3-grams; a shorter text is one shingle, an empty one none."""
    known: dict[str, int] = {}
    result = []
    for text in texts:
        words = _WORD.findall(text.casefold())
        hashes = np.array([_word_hash(word, known) for word in words], dtype=np.uint64)
        count = max(1, len(hashes) - _WORDS_PER_SHINGLE + 1)
        if len(hashes):
            mixed = np.zeros(count, dtype=np.uint64)
            for offset in range(min(_WORDS_PER_SHINGLE, len(hashes))):
                # Multiplying between additions makes the order of the words count.
                mixed = (mixed + hashes[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
                mixed ^= mixed >> np.uint64(29)
            hashes = np.unique(mixed)
        result.append(hashes)
    return result


def _word_hash(word: str, known: dict[str, int]) -> int:
    if word not in known:
        known[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
    return known[word]


def _candidates(
    indices: Sequence[int], prompts: Sequence[Side], completions: Sequence[Side], threshold: float
) -> Iterator[tuple[int, int]]:
    """Pairs that share a band of their MinHash signatures over prompt and completion shingles together.

    When both sides reach the threshold so does their disjoint union, so that one signature serves both.
    """
    from datasketch import MinHash, MinHashLSH

    # A band of r rows matches with probability s**r; b bands miss a pair of similarity s with (1 - s**r)**b.
    rows_per_band = min(32, max(1, int(math.log(0.55) / math.log(threshold))))
    bands = math.ceil(math.log(_MISSED) / math.log(1 - threshold**rows_per_band))
    index = MinHashLSH(num_perm=bands * rows_per_band, params=(bands, rows_per_band))
    blank = MinHash(num_perm=bands * rows_per_band, hashfunc=int)
    for later in indices:
        signature = blank.copy()
        # The completion's bits are flipped, so that the same words on different sides are different shingles.
        both = np.concatenate([prompts[later].telling, ~completions[later].telling]) & np.uint64(0xFFFFFFFF)
        signature.update_batch(both.tolist())
        for earlier in sorted(int(str(key)) for key in index.query(signature)):
            yield earlier, later
        index.insert(later, signature, check_duplication=False)


def _spoken(message: Message) -> str:
    return " ".join([message.content, *(str(dict(call)) for call in message.tool_calls)])
