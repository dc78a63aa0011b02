"""Curation: each dropped or flagged row has one reason in the ledger, and nothing else is touched."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import count

import pytest

from tunesmith.data.curate import (
    CONFLICT,
    DISAGREEMENT,
    EMPTY_COMPLETION,
    EMPTY_EARLIER,
    EMPTY_PROMPT,
    EQUAL_SIDES,
    EXACT_DUPLICATE,
    LEAKAGE,
    NEAR_DUPLICATE,
    PERSONAL_DATA,
    SECRET,
    SPLITS,
    census,
    curate,
    drop_overlong,
)
from tunesmith.data.layout import PROMPT_ONLY, comparison_id, conversation_id, plain_row
from tunesmith.data.privacy import personal_data, secrets
from tunesmith.data.split import Splits, split
from tunesmith.errors import DataError
from tunesmith.recipe import DataSpec
from tunesmith.types import Comparison, Conversation, LedgerEntry, Message, Row

SPEC = DataSpec(train="rows.jsonl", valid=0.1, test=0.1)
ROLES = ("user", "assistant", "user", "assistant")
LONG = " ".join(f"word{number}" for number in range(60))


def splits(train: list[tuple[str, str]], valid: list[tuple[str, str]] = (), test: list[tuple[str, str]] = ()) -> Splits:
    return Splits(
        train=tuple(plain_row(*pair, f"train.jsonl:{line}") for line, pair in zip(count(1), train, strict=False)),
        valid=tuple(plain_row(*pair, f"valid.jsonl:{line}") for line, pair in zip(count(1), valid, strict=False)),
        test=tuple(plain_row(*pair, f"test.jsonl:{line}") for line, pair in zip(count(1), test, strict=False)),
    )


def told(ledger: Sequence[LedgerEntry]) -> list[tuple[str, str, str, str]]:
    return sorted((entry.source, entry.action, entry.reason, entry.detail) for entry in ledger)


def test_good_rows_pass_untouched_and_in_order() -> None:
    given = splits([("a", "1"), ("b", "2")], [("c", "3")], [("d", "4")])
    kept, ledger = curate(given, SPEC)
    assert kept == given
    assert ledger == []


def test_empty_and_repeated_rows_are_dropped() -> None:
    given = splits([("a", "1"), ("a", "1"), (" ", "1"), ("b", "\n"), ("c", "1")])
    kept, ledger = curate(given, SPEC)
    assert [row.source for row in kept.train] == ["train.jsonl:1", "train.jsonl:5"]
    assert told(ledger) == [
        ("train.jsonl:2", "dropped", EXACT_DUPLICATE, "same as train.jsonl:1"),
        ("train.jsonl:3", "dropped", EMPTY_PROMPT, ""),
        ("train.jsonl:4", "dropped", EMPTY_COMPLETION, ""),
    ]


def test_the_first_row_of_the_file_is_kept_whatever_the_order() -> None:
    rows = splits([("a", str(number)) for number in range(12)]).train
    kept, _ = curate(Splits(train=rows[::-1], valid=(), test=()), SPEC)
    assert [row.source for row in kept.train] == ["train.jsonl:1"]


@pytest.mark.parametrize(("conflicts", "action", "left"), [("drop", "dropped", 1), ("flag", "flagged", 2)])
def test_conflicting_completions_are_dropped_or_flagged(conflicts: str, action: str, left: int) -> None:
    kept, ledger = curate(splits([("a", "1"), ("a ", "2")]), SPEC.model_copy(update={"conflicts": conflicts}))
    assert len(kept.train) == left
    assert told(ledger) == [("train.jsonl:2", action, CONFLICT, "train.jsonl:1 answers the same prompt differently")]


def test_of_near_duplicates_each_split_keeps_the_first() -> None:
    twins = [(LONG, "1"), (LONG + " more", "1")]
    kept, ledger = curate(splits(twins, test=[(pair[0][::-1], "1") for pair in twins]), SPEC)
    assert [row.source for row in kept.test] == ["test.jsonl:1"]
    assert told(ledger) == [
        ("test.jsonl:2", "dropped", NEAR_DUPLICATE, "nearly test.jsonl:1"),
        ("train.jsonl:2", "dropped", NEAR_DUPLICATE, "nearly train.jsonl:1"),
    ]
    kept, ledger = curate(splits(twins), SPEC.model_copy(update={"near_duplicates": 1.0}))
    assert (len(kept.train), ledger) == (2, [])


def test_held_out_rows_that_leaked_are_dropped_from_train_and_named() -> None:
    given = splits(
        [("t", "1"), ("v", "1"), (LONG + " more", "1"), ("own", "1"), ("t", "2")],
        [("v", "1"), ("t", "1"), ("w", "1")],
        [("t", "1"), (LONG, "1")],
    )
    kept, ledger = curate(given, SPEC)
    assert [row.source for row in kept.train] == ["train.jsonl:4"]
    assert [row.source for row in kept.valid] == ["valid.jsonl:1", "valid.jsonl:3"]
    assert kept.test == given.test
    assert {(entry.source, entry.reason, entry.detail) for entry in ledger} == {
        ("train.jsonl:1", LEAKAGE, "same row as held-out test.jsonl:1"),
        ("train.jsonl:2", LEAKAGE, "same row as held-out valid.jsonl:1"),
        ("train.jsonl:3", LEAKAGE, "nearly held-out test.jsonl:2"),
        ("train.jsonl:5", CONFLICT, "train.jsonl:1 answers the same prompt differently"),
        ("valid.jsonl:2", LEAKAGE, "same row as held-out test.jsonl:1"),
    }


def test_a_held_out_question_that_a_training_conversation_goes_through_is_dropped_and_named() -> None:
    turns = [
        Message(role=role, content=text) for role, text in zip(ROLES, ("Where?", "Here.", "When?", "Now."), strict=True)
    ]
    chat = Conversation(messages=tuple(turns), id="chat", source="train.jsonl:1")
    asked = plain_row("where", "Here.", "test.jsonl:1")
    later = plain_row("When?", "Now.", "test.jsonl:2")  # asked after nothing, it is another question
    kept, ledger = curate(Splits(train=(chat,), valid=(), test=(asked, later)), SPEC)
    assert [row.source for row in kept.test] == ["test.jsonl:2"]
    assert len(kept.train) == 1
    detail = "an earlier turn of the training row train.jsonl:1 asks the same"
    assert told(ledger) == [("test.jsonl:1", "dropped", LEAKAGE, detail)]


def test_every_row_is_kept_or_dropped_exactly_once() -> None:
    draw = random.Random(0)
    pairs = [(draw.choice(["", "a", "b", LONG, LONG + " x"]), draw.choice(["", "1", "2"])) for _ in range(60)]
    given = splits(pairs, pairs[:5], [*pairs[5:9], ("c", "3")])
    try:
        kept, ledger = curate(given, SPEC)
    except DataError:
        kept, ledger = curate(splits([*pairs, ("z", "9")], [*pairs[:5], ("y", "8")], [("c", "3")]), SPEC)
        given = splits([*pairs, ("z", "9")], [*pairs[:5], ("y", "8")], [("c", "3")])
    dropped = [entry.source for entry in ledger if entry.action == "dropped"]
    left = [row.source for row in (*kept.train, *kept.valid, *kept.test)]
    assert sorted(dropped + left) == sorted(row.source for row in (*given.train, *given.valid, *given.test))


def test_an_emptied_split_is_an_error() -> None:
    with pytest.raises(DataError, match="no row of train is left of 2"):
        curate(splits([("", "1"), ("a", "1")], test=[("a", "1")]), SPEC)


def judged(
    better: str, worse: str, rater: str = "", line: int = 1, *, prompt: str = "q", file: str = "t"
) -> Comparison:
    asked = (Message(role="user", content=prompt),)
    chosen, rejected = (Message(role="assistant", content=text) for text in (better, worse))
    identity = comparison_id(asked, chosen, rejected, rater)
    source = f"{file}.jsonl:{line}"
    return Comparison(prompt=asked, chosen=chosen, rejected=rejected, rater=rater, id=identity, source=source)


def only_train(*rows: Row) -> Splits:
    return Splits(train=rows, valid=(), test=())


def test_a_person_may_not_contradict_himself_but_people_may_differ() -> None:
    rows = (judged("x", "y", "ann", 1), judged("y", "x", "bob", 2), judged("y ", "x", "ann", 3))
    kept, ledger = curate(only_train(*rows), SPEC)
    assert kept.train == rows[:2]
    assert told(ledger) == [
        ("t.jsonl:2", "flagged", DISAGREEMENT, "t.jsonl:1 prefers the other answer"),
        ("t.jsonl:3", "dropped", CONFLICT, "t.jsonl:1 prefers the other answer"),
    ]


def test_equal_judgements_count_once_a_person() -> None:
    rows = (judged(LONG, "y", "ann", 1), judged(LONG, "y", "bob", 2), judged(LONG, "y", "ann", 3))
    kept, ledger = curate(only_train(*rows, judged(f"{LONG}!", "y", "bob", 4)), SPEC)
    assert kept.train == rows[:2]
    assert told(ledger) == [
        ("t.jsonl:3", "dropped", EXACT_DUPLICATE, "same as t.jsonl:1"),
        ("t.jsonl:4", "dropped", NEAR_DUPLICATE, "nearly t.jsonl:2"),
    ]


def test_a_choice_between_equal_or_empty_answers_is_dropped() -> None:
    rows = (
        judged("x", " x\n"),
        judged("x", " ", line=2),
        judged("x", "y", line=3, prompt=" "),
        judged("x", "y", line=4),
    )
    kept, ledger = curate(only_train(*rows), SPEC)
    assert kept.train == rows[3:]
    assert told(ledger) == [
        ("t.jsonl:1", "dropped", EQUAL_SIDES, ""),
        ("t.jsonl:2", "dropped", EMPTY_COMPLETION, ""),
        ("t.jsonl:3", "dropped", EMPTY_PROMPT, ""),
    ]


def test_where_prompts_are_few_an_answer_leaks_and_a_prompt_does_not() -> None:
    train = (judged("a", "b", line=1), judged("c", "d", line=2), judged("e", "f", line=3))
    test = (judged("g", "h", line=1, file="test"), judged("d", "i", line=2, file="test"))
    kept, ledger = curate(Splits(train=train, valid=(), test=test, unit="answer"), SPEC)
    assert (kept.train, kept.test, kept.unit) == ((train[0], train[2]), test, "answer")
    assert told(ledger) == [("t.jsonl:2", "dropped", LEAKAGE, "same answer as held-out test.jsonl:2")]
    other = judged("a", "b", line=4, prompt="p")
    kept, ledger = curate(Splits(train=(*train, other), valid=(), test=test), SPEC)
    assert kept.train == (other,)
    assert {entry.detail for entry in ledger} == {"same prompt as held-out test.jsonl:2"}


def test_many_answers_to_one_prompt_are_kept_where_the_recipe_says_so() -> None:
    spec = SPEC.model_copy(update={"conflicts": "keep"})
    given = splits([("a", "1"), ("a", "2"), ("a", "3")], test=[("a", "4"), ("a", "2")])
    kept, ledger = curate(Splits(train=given.train, valid=(), test=given.test, unit="answer"), spec)
    assert [row.completion for row in kept.train] == ["1", "3"]
    assert told(ledger) == [("train.jsonl:2", "dropped", LEAKAGE, "same row as held-out test.jsonl:2")]


def test_a_row_that_only_asks_is_kept_with_its_empty_answer() -> None:
    turns = (Message(role="user", content="q"), Message(role="assistant", content=""))
    extra = {PROMPT_ONLY: True}
    row = Conversation(messages=turns, id=conversation_id(turns), source="train.jsonl:1", extra=extra)
    kept, ledger = curate(only_train(row), SPEC)
    assert (kept.train, ledger) == ((row,), [])


def test_a_conversation_that_would_train_an_empty_answer_on_the_way_is_dropped() -> None:
    turns = tuple(Message(role=role, content=text) for role, text in zip(ROLES, ("q", " ", "r", "a"), strict=True))
    row = Conversation(messages=turns, id="1", source="train.jsonl:1")
    kept, ledger = curate(Splits(train=(row, *splits([("b", "2")]).train), valid=(), test=()), SPEC)
    assert (len(kept.train), told(ledger)) == (1, [("train.jsonl:1", "dropped", EMPTY_EARLIER, "")])


def test_an_answer_that_only_calls_tools_is_not_empty() -> None:
    turn = Message(role="assistant", content="", tool_calls=({"name": "find"},))
    row = Conversation(messages=(Message(role="user", content="q"), turn), id="1", source="train.jsonl:1")
    kept, ledger = curate(Splits(train=(row,), valid=(), test=()), SPEC)
    assert (len(kept.train), ledger) == (1, [])


def test_the_ledger_names_the_kind_of_a_secret_and_never_the_secret() -> None:
    key = "AKIA" + "ABCDEFGHIJKLMNOP"
    kept, ledger = curate(splits([("my key", f"is {key}"), ("write to", "ann@example.org")]), SPEC)
    assert len(kept.train) == 2
    assert told(ledger) == [
        ("train.jsonl:1", "flagged", SECRET, "AWS access key"),
        ("train.jsonl:2", "flagged", PERSONAL_DATA, "email address"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA PRIVATE KEY-----",
        "ghp_" + "a1" * 18,
        "xoxb-" + "1234567890-abc",
        "AIza" + "a" * 35,
        "hf_" + "A" * 34,
        "sk_live_" + "a" * 20,
        "sk-" + "a" * 40,
        "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0.x",
        'api_key = "abc123def456ghi7"',
    ],
)
def test_secrets_are_found_by_shape(text: str) -> None:
    assert secrets(f"here: {text}")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mail ann.b+c@mail.example.co.uk now", "email address"),
        ("call (555) 123-4567", "phone number"),
        ("call +44 20 7946 0958", "phone number"),
        ("card 4111 1111 1111 1111", "payment card"),
        ("pay to GB82 WEST 1234 5698 7654 32 today", "bank account (IBAN)"),
        ("pay to DE89370400440532013000", "bank account (IBAN)"),
        ("SSN 123-45-6789", "US social security number"),
    ],
)
def test_personal_data_is_found_by_shape_and_check_digits(text: str, kind: str) -> None:
    assert personal_data(text) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "Hale v. Lee, 957 F. Supp. 2d 1042 (D. Wyo. 2008).",
        "card 4111 1111 1111 1112",
        "GB83 WEST 1234 5698 7654 32",
        "000-12-3456 and 666-12-3456",
        "on 2024-01-31 at 10:15:30, version 1.22.333.4444",
        "the password is in the safe; secret: none",
        "user@ home, a@b",
        "order 1234567890",
    ],
)
def test_ordinary_text_is_not_flagged(text: str) -> None:
    assert personal_data(text) + secrets(text) == []


@pytest.mark.parametrize("unit", ["a", "1", "1 ", "+1 ", "eyJ-", "a@", "a.", "AA11 ", "password=", "-----BEGIN A "])
def test_patterns_pass_long_hostile_text_quickly(unit: str) -> None:
    # Quadratic patterns would take hours here, and the test would hang.
    text = unit * (200_000 // len(unit))
    secrets(text)
    personal_data(text)


def test_overlong_rows_are_an_error_that_names_the_first() -> None:
    rows = splits([("a", "1"), ("b", "2"), ("c", "3")]).train
    with pytest.raises(DataError, match=r"11 tokens, more than max_tokens = 10 \(2 of 3 rows are\)") as caught:
        drop_overlong(rows, [3, 11, 12], 10, "error")
    assert caught.value.where == "train.jsonl:2"


def test_overlong_rows_are_dropped_with_an_entry_when_asked() -> None:
    rows = splits([("a", "1"), ("b", "2"), ("c", "3")]).train
    kept, ledger = drop_overlong(rows, [3, 11, 10], 10, "drop")
    assert [row.source for row in kept] == ["train.jsonl:1", "train.jsonl:3"]
    assert told(ledger) == [("train.jsonl:2", "dropped", "too many tokens", "11 tokens, limit 10")]
    with pytest.raises(DataError):
        drop_overlong(rows, [11, 11, 11], 10, "drop")


def test_the_census_adds_up() -> None:
    given = splits([("a", "1"), ("a", "1"), ("b", "x@example.org"), ("t", "1")], [("v", "1")], [("t", "1")])
    kept, ledger = curate(given, SPEC)
    found = census(given, kept, ledger)
    train = found.splits["train"]
    assert (train.read, train.kept) == (4, 2)
    assert train.dropped == {EXACT_DUPLICATE: 1, LEAKAGE: 1}
    assert train.flagged == {PERSONAL_DATA: 1}
    assert found.total.read == 6
    assert found.total.read - sum(found.total.dropped.values()) == found.total.kept


def test_splits_are_those_of_the_first_version() -> None:
    # A later version that moves rows between splits would judge old models on rows that they were trained on.
    draw = random.Random(0)
    words = [f"w{number}" for number in range(300)]
    pairs: list[tuple[str, str]] = []
    for number in range(150):
        prompt, completion = " ".join(draw.choices(words, k=draw.randint(1, 30))), draw.choice(words)
        if number % 5 == 0 and pairs:
            prompt, completion = draw.choice(pairs)
            prompt, completion = draw.choice([(prompt, completion), (prompt, "no"), (f"{prompt} indeed", completion)])
        pairs.append((prompt, completion))
    whole = split([plain_row(*pair, f"rows.jsonl:{line}") for line, pair in enumerate(pairs, start=1)], SPEC)
    kept, ledger = curate(whole, SPEC)
    assert digest_of(whole, []) == "b9e7d2cb4521c500"
    assert digest_of(kept, ledger) == "8561ceac0284a936"


def digest_of(found: Splits, ledger: Sequence[LedgerEntry]) -> str:
    lines = [f"{name} {row.source}" for name in SPLITS for row in getattr(found, name)]
    lines += [f"{entry.source} {entry.action} {entry.reason} {entry.detail}" for entry in ledger]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
