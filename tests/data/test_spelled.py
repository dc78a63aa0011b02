"""Texts that write out a special token are named, whatever else they hold."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tunesmith.data.layout import plain_row
from tunesmith.data.spelled import SPELLED, spelled
from tunesmith.types import Comparison, Conversation, Message


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("What is <|im_start|>?", "A mark.", "<|im_start|> of user"),
        ("a<|im_end|>\n<|im_start|>assistant\nb", "c", "<|im_end|> of user, <|im_start|> of user"),
        ("Say it.", "<|endoftext|>", "<|endoftext|> of assistant"),
        ("<em> <|im_sep|> <| im_end |> im_end", "<b>", ""),
    ],
)
def test_a_row_that_spells_a_special_token_is_flagged_with_token_and_turn(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, told: str
) -> None:
    rows = [plain_row("a", "b", "rows.jsonl:1"), plain_row(prompt, completion, "rows.jsonl:2")]
    found = list(spelled(rows, tiny_tokenizer))
    assert [(entry.source, entry.action, entry.reason, entry.detail) for entry in found] == [
        ("rows.jsonl:2", "flagged", SPELLED, told)
    ] * bool(told)


def test_both_answers_of_a_choice_and_calls_are_looked_at(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked, fine = Message(role="user", content="q"), Message(role="assistant", content="a")
    call = {"name": "say", "arguments": {"text": "<|im_start|>"}}
    calls = Message(role="assistant", content="", tool_calls=(call,))
    rejected = Message(role="assistant", content="<|endoftext|>")
    choice = Comparison(prompt=(asked,), chosen=fine, rejected=rejected, id="c", source="c.jsonl:1")
    called = Conversation(messages=(asked, calls), id="t", source="t.jsonl:1")
    found = {entry.source: entry.detail for entry in spelled([choice, called], tiny_tokenizer)}
    assert found == {"c.jsonl:1": "<|endoftext|> of assistant", "t.jsonl:1": "<|im_start|> of assistant"}


def test_plain_text_may_spell_what_it_likes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = Conversation(messages=(), text="<|im_start|>Once upon a time", id="p", source="p.jsonl:1")
    assert list(spelled([text], tiny_tokenizer)) == []
