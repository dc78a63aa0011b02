"""Baselines that need no model, so that nobody mistakes lookup for learning.

If copying the answer of the most similar training row does as well as the tuned model, the training set already held
the answers. If always giving the commonest answer does, the metric is too easy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt
from scipy import sparse

from ..data.read import reference
from ..data.store import digest, some
from ..errors import DataError
from ..types import Conversation, Item, Message

GRAM_LENGTHS = (3, 4, 5)
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / 1.618..., odd
BUCKETS = 1 << 20  # columns that n-grams are hashed into; collisions are rare and only blur
LONGEST_TEXT_CHARACTERS = 4_000  # of a longer prompt the end is compared, where the question usually stands
CHUNK_ROWS = 256
MOST_ROWS = 50_000  # that a copied answer is looked for in: the vectors of all of them are in memory


def nearest_neighbour(train: Sequence[Conversation], items: Sequence[Item]) -> list[str]:
    """For each item, the completion of the training row whose prompt is most similar; ties go to the earliest row.

    Similarity is the cosine of TF-IDF vectors (Salton and Buckley 1988) of character 3-, 4- and 5-grams, case folded.
    Of more than MOST_ROWS rows a random sample of that many stands for all. Raises DataError without training rows.
    """
    _check(train)
    train = _sample(train)
    counts = _count_grams([_text(row.prompt) for row in train])
    rows_with_gram = np.bincount(counts.indices, minlength=BUCKETS)
    rarity = np.log((1 + len(train)) / (1 + rows_with_gram)) + 1  # the +1 keeps n-grams that stand in every row
    known = _unit_rows(counts, rarity).T.tocsr()
    nearest: list[int] = []
    for start in range(0, len(items), CHUNK_ROWS):
        chunk = [_text(item.prompt) for item in items[start : start + CHUNK_ROWS]]
        similarity = (_unit_rows(_count_grams(chunk), rarity) @ known).toarray()
        # Rounded, so that equal prompts tie whatever order their products were summed in.
        nearest += np.argmax(similarity.round(6), axis=1).tolist()
    return [reference(train[index]) for index in nearest]


def majority(train: Sequence[Conversation], items: Sequence[Item]) -> list[str]:
    """The commonest training completion for every item; ties go to the one seen first. DataError without rows."""
    _check(train)
    keys = np.fromiter((digest(reference(row)) for row in train), np.uint64, len(train))
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    commonest = first[counts == counts.max()].min()
    return [reference(train[int(commonest)])] * len(items)


def _check(train: Sequence[Conversation]) -> None:
    if not train:
        raise DataError("no training rows to look answers up in", fix="Check data.train and the ledger.")


def _sample(rows: Sequence[Conversation]) -> Sequence[Conversation]:
    """At most MOST_ROWS of the rows, in their order."""
    if len(rows) <= MOST_ROWS:
        return rows
    return some(rows, np.sort(np.random.default_rng(0).choice(len(rows), MOST_ROWS, replace=False)))


def _text(prompt: Sequence[Message]) -> str:
    """What is compared: the turns, whitespace folded, with a space at both ends so that words have edges."""
    words = " ".join(message.content for message in prompt).casefold().split()
    return f" {' '.join(words)[-LONGEST_TEXT_CHARACTERS:]} "


def _count_grams(texts: Sequence[str]) -> sparse.csr_array:
    """Counts of hashed n-grams: one row per text, BUCKETS columns, float32."""
    blocks = [_count_block(texts[start : start + CHUNK_ROWS]) for start in range(0, len(texts), CHUNK_ROWS)]
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def _count_block(texts: Sequence[str]) -> sparse.csr_array:
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in texts])
    rows, columns = [], []
    for length in GRAM_LENGTHS:
        starts = np.flatnonzero(owner[: max(0, len(owner) - length + 1)] == owner[length - 1 :])
        rows.append(owner[starts])
        columns.append(_hash_grams(points, starts, length))
    row, column = np.concatenate(rows), np.concatenate(columns)
    block = sparse.coo_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=(len(texts), BUCKETS))
    return sparse.csr_array(block)


def _hash_grams(points: UInt[np.ndarray, "C"], starts: Int[np.ndarray, "G"], length: int) -> Int[np.ndarray, "G"]:
    """A bucket for each n-gram: xor and multiply per code point (Knuth's multiplicative hashing, 64 bits).

    The bucket is the upper bits, which depend on all bits below. A last xor-shift lets the last code point reach them.
    """
    hashed = np.full(len(starts), length, dtype=np.uint64)
    for offset in range(length):
        hashed = (hashed ^ points[starts + offset]) * GOLDEN_RATIO
    hashed = (hashed ^ (hashed >> np.uint64(32))) * GOLDEN_RATIO
    return (hashed >> np.uint64(44)).astype(np.int32)


def _unit_rows(counts: sparse.csr_array, rarity: np.ndarray) -> sparse.csr_array:
    """TF-IDF rows of length 1; a row without n-grams stays 0."""
    weighted = counts.copy()
    weighted.data = (counts.data * rarity[counts.indices]).astype(np.float32)
    lengths = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    weighted.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(weighted.indptr)).astype(np.float32)
    return weighted
