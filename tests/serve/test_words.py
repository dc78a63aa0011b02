"""Text as it is drawn: whole characters, held-back stop strings, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tunesmith.serve.words import HALF, Said, Speaker

LIVELY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def spoken(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stops: Sequence[str] = ()) -> list[Said]:
    speaker = Speaker(tokenizer, stops)
    said = []
    for number, token in enumerate(tokens):
        said.append(speaker.say(token, -float(number)))
        if speaker.stopped:
            return said
    return [*said, speaker.finish()]


def joined(said: Sequence[Said]) -> str:
    return "".join(one.text for one in said)


@given(st.lists(st.integers(0, 299), max_size=40))
@LIVELY
def test_pieces_of_any_tokens_join_to_the_decoded_answer(
    tiny_tokenizer: PreTrainedTokenizerFast, tokens: list[int]
) -> None:
    tokens = [token for token in tokens if token < len(tiny_tokenizer)]
    said = spoken(tiny_tokenizer, tokens)
    assert joined(said) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)
    assert [word.token for one in said for word in one.words] == tokens


@given(st.text(max_size=12))
@LIVELY
def test_no_piece_holds_half_a_character(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    text = text.replace(HALF, "")
    said = spoken(tiny_tokenizer, tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
    assert all(HALF not in one.text for one in said)
    assert joined(said) == text


@given(st.text("abcé", max_size=20), st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=4))
@LIVELY
def test_an_answer_ends_before_its_first_stop_string_and_never_showed_a_part_of_it(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]
) -> None:
    said = spoken(tiny_tokenizer, tiny_tokenizer(text, add_special_tokens=False)["input_ids"], stops)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert joined(said) == text
        return
    cuts = [text.find(stop) for stop in stops if 0 <= text.find(stop) <= ends[0] - len(stop)]
    assert joined(said) == text[: min(cuts)]


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = tiny_tokenizer("xabyab", add_special_tokens=False)["input_ids"]
    assert [one.text for one in spoken(tiny_tokenizer, tokens, ["abc"])] == ["x", "", "", "aby", "", "", "ab"]


@pytest.mark.parametrize(("stops", "count"), [((), 3), (("b",), 1), (("c",), 2)])
def test_the_words_of_a_cut_answer_are_those_it_shows(
    tiny_tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...], count: int
) -> None:
    tokens = tiny_tokenizer("abc", add_special_tokens=False)["input_ids"]
    words = [word for one in spoken(tiny_tokenizer, tokens, stops) for word in one.words]
    assert [word.token for word in words] == tokens[:count]
    assert [word.start for word in words] == list(range(count))
