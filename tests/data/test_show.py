"""The viewer shows the whole row, and in green exactly what is trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tunesmith.data.render import render
from tunesmith.data.show import TRAINED, masked_text
from tunesmith.types import Conversation, Example, Message


def green(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    text = masked_text(example, tokenizer)
    return [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED]


def test_the_answer_and_its_end_of_turn_are_green(
    tiny_examples: list[Example], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for example in tiny_examples[:5]:
        (shown,) = green(example, tiny_tokenizer)
        assert shown == tiny_tokenizer.decode(example.tokens[example.weights > 0].tolist())
        assert shown.endswith("<|im_end|>")
        assert masked_text(example, tiny_tokenizer).plain == tiny_tokenizer.decode(example.tokens.tolist())


def test_characters_of_several_tokens_stay_whole(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Message(role="user", content="né [bold]"), Message(role="assistant", content="日本 [/]"))
    (example,) = render(Conversation(messages=turns, id="r", source="x:1"), tiny_tokenizer, [2])
    assert green(example, tiny_tokenizer) == ["日本 [/]<|im_end|>"]
    assert "né [bold]" in masked_text(example, tiny_tokenizer).plain
