"""Sentiment rows: made from people's ratings, no sentence in two parts or in two pairs."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.data import sentiment
from tunesmith.data.curate import curate
from tunesmith.data.sentiment import PARTS, SMALLEST_GAP, Sentence, in_part, pairs, read_sentences
from tunesmith.data.split import Splits, split
from tunesmith.data.tasks import builtin
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.own import load_function
from tunesmith.folder import sha256_file
from tunesmith.recipe import DataSpec
from tunesmith.types import Comparison, Conversation, Item

RECIPES = Path(__file__).parents[2] / "recipes" / "rlhf"
TABLES = ("amazonReviewSnippets", "movieReviewSnippets", "tweets")
WORDS = [f"word{number}" for number in range(300)]


def sdist(path: Path, lines: dict[str, list[str]]) -> Path:
    """A file laid out as the sdist of the ratings."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for table in TABLES:
            content = "\ufeff" + "".join(f"{line}\r\n" for line in lines.get(table, []))
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{table}_GroundTruth.txt")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    lines = {
        table: [
            f"{number}\t{draw.uniform(-4, 4):.4f}\t{' '.join(draw.choices(WORDS, k=draw.randint(4, 30)))}"
            for number in range(400)
        ]
        for table in TABLES
    }
    return sdist(tmp_path_factory.mktemp("ratings") / "vaderSentiment-0.5.zip", lines)


@pytest.fixture(scope="module")
def sentences(ratings: Path) -> list[Sentence]:
    return read_sentences(ratings)


@pytest.fixture
def _cached(ratings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(ratings.parent))
    monkeypatch.setattr(sentiment, "_SHA256", sha256_file(ratings))


def test_only_clean_sentences_are_read_and_none_twice(tmp_path: Path) -> None:
    given = [
        "1\t2.5\tA  good&amp;cheap film to see.",
        "2\t-1\ta good&cheap film, to see",
        "3\t1.0\ttoo short this",
        "4\t1.0\tan odd \x07 bell in it",
        "5\t1.0\tthanks to @anonymous for this film",
        "6\t1.0\tsee http://url_removed for more films",
        f"7\t1.0\t{'long ' * 61}",
        "8\t-3.25\tNot worth the price of admission.",
    ]
    found = read_sentences(sdist(tmp_path / "ratings.zip", {"movieReviewSnippets": given}))
    assert [(sentence.text, sentence.rating) for sentence in found] == [
        ("A good&cheap film to see.", 2.5),
        ("Not worth the price of admission.", -3.25),
    ]
    assert {sentence.prompt for sentence in found} == {"Write one sentence from a movie review."}


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ratings.zip"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ratings\.zip: does not hold the ratings"):
        read_sentences(path)


def test_every_sentence_is_in_one_part_and_stays_there(sentences: list[Sentence]) -> None:
    parts = {part: in_part(sentences, part, 0) for part in PARTS}
    assert Counter(map(id, sentences)) == Counter(id(each) for part in parts.values() for each in part)
    assert len(parts["train"]) == pytest.approx(PARTS["train"] * len(sentences), rel=0.05)
    half = sentences[::2]
    assert in_part(half[::-1], "test", 0) == [each for each in parts["test"] if each in half]
    assert in_part(sentences, "test", 1) != parts["test"]


def test_pairs_have_a_wide_gap_one_kind_and_sentences_of_their_own(sentences: list[Sentence]) -> None:
    by_text = {sentence.text: sentence for sentence in sentences}
    rows = list(pairs(in_part(sentences, "train", 0), "train", 0))
    assert len(rows) > 250
    for row in rows:
        better, worse = by_text[row.chosen.content], by_text[row.rejected.content]
        gap = better.rating - worse.rating
        assert row.extra == {"gap": pytest.approx(gap, abs=1e-3), "kind": better.kind}
        assert (better.kind, row.prompt[0].content) == (worse.kind, worse.prompt)
        assert gap >= SMALLEST_GAP
        assert better.rating > 0 > worse.rating
    said = [answer.content for row in rows for answer in (row.chosen, row.rejected)]
    assert len(said) == len(set(said))
    assert len({row.id for row in rows}) == len(rows)
    assert rows == list(pairs(in_part(sentences[::-1], "train", 0), "train", 0))


def test_parts_of_pairs_pass_curation_untouched(sentences: list[Sentence]) -> None:
    train, valid, test = (tuple(pairs(in_part(sentences, part, 0), part, 0)) for part in PARTS)
    sources = [row.source for row in (*train, *valid, *test)]
    assert len(sources) == len(set(sources))
    assert {source.rpartition(":")[0] for source in sources} == {
        "builtin:sentiment_pairs",
        "builtin:sentiment_pairs/valid",
        "builtin:sentiment_pairs/test",
    }
    given = Splits(train=train, valid=valid, test=test, unit="answer")
    kept, ledger = curate(given, DataSpec(train="x"))
    assert (kept, ledger) == (given, [])


def test_three_prompts_are_split_by_their_answers(sentences: list[Sentence]) -> None:
    rows: list[Comparison] = list(pairs(in_part(sentences, "train", 0), "train", 0))
    found = split(rows, DataSpec(train="x", valid=0.1, test=0.2))
    assert found.unit == "answer"
    assert all((found.train, found.valid, found.test))


@pytest.mark.parametrize("name", ["sentiment_pairs/dev", "sentiment_pairs/", "legal_citations/test", "/test"])
def test_an_unknown_part_lists_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError, match="NAME/valid"):
        builtin(name, None, 0)


@pytest.mark.usefixtures("_cached")
def test_each_task_gives_its_part_whole_or_as_many_rows_as_asked_for(sentences: list[Sentence]) -> None:
    rating_of = {sentence.text: sentence.rating for sentence in sentences}
    for task in ("sentiment_pairs", "sentiment_sentences", "sentiment_labels"):
        parts = {part: list(builtin(name, None, 0)) for part, name in zip(PARTS, names(task), strict=True)}
        assert list(builtin(task, 7, 0)) == parts["train"][:7]
        assert min(len(part) for part in parts.values()) > 10
        said = [{text for row in part for text in texts(row)} & set(rating_of) for part in parts.values()]
        assert not said[0] & said[1] | said[0] & said[2] | said[1] & said[2]


def names(task: str) -> tuple[str, str, str]:
    return task, f"{task}/valid", f"{task}/test"


def texts(row: Conversation | Comparison) -> list[str]:
    if isinstance(row, Comparison):
        return [row.chosen.content, row.rejected.content]
    return [row.completion, row.prompt[0].content.rpartition("\n")[2]]


@pytest.mark.usefixtures("_cached")
def test_sentences_are_of_both_kinds_and_labels_are_those_of_the_ratings() -> None:
    for row in builtin("sentiment_sentences", None, 0):
        assert isinstance(row, Conversation)
        assert abs(float(str(row.extra["rating"]))) >= 0.5
    signs = set()
    for row in builtin("sentiment_labels", None, 0):
        assert isinstance(row, Conversation)
        rating = float(str(row.extra["rating"]))
        assert abs(rating) >= 1
        assert row.completion == ("positive" if rating > 0 else "negative")
        signs.add(row.completion)
    assert signs == {"positive", "negative"}


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Positive.", 1), ("It is positive, not negative", 1), ("negative or positive?", 0), ("fine", 0), ("", 0)],
)
def test_the_reward_is_one_for_the_right_label(answer: str, score: float) -> None:
    item = Item(prompt=(), reference="positive", id="1")
    assert load_function("verify.py:correct", RECIPES)(answer, item) == score


def test_the_lexicon_tells_praise_from_blame() -> None:
    item = Item(prompt=(), reference="", id="1")
    score = load_function("lexicon.py:sentiment", RECIPES)
    assert -1 <= score("A dull, awful waste of time.", item) < score("", item) == 0 < score("I love it!", item) <= 1
