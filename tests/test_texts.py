"""A text outside a template begins as the model's tokenizer begins texts, everywhere."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tunesmith.data.render import prompt_tokens, render
from tunesmith.evaluate.forgetting import TEXT_TOKENS, general_texts
from tunesmith.evaluate.other_program import Transformers
from tunesmith.evaluate.parity import _prompt
from tunesmith.methods.rehearsal import own_text, own_texts
from tunesmith.model.load import PLAIN_TEMPLATE, Model, load, load_vocabulary
from tunesmith.model.modelfile import modelfile
from tunesmith.serve.asking import completion_question
from tunesmith.serve.bodies import CompletionBody
from tunesmith.serve.engine import Engine, Limits
from tunesmith.serve.hall import Hall
from tunesmith.texts import beginning, text_tokens
from tunesmith.types import Conversation, Item, Message
from tunesmith.world import World

BOS = 1


@pytest.fixture(scope="module")
def model(beginning_model_folder: Path) -> Model:
    return load(str(beginning_model_folder), World())


def plain(text: str) -> Conversation:
    return Conversation(messages=(), text=text, id="t", source="rows.txt:1")


def test_a_text_begins_as_the_tokenizer_begins_it_and_once(
    tiny_tokenizer: PreTrainedTokenizerFast, beginning_tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = tiny_tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert text_tokens(tiny_tokenizer, "one two") == alone
    assert text_tokens(tiny_tokenizer, "") == []
    assert text_tokens(beginning_tokenizer, "one two") == [BOS, *alone]
    assert text_tokens(beginning_tokenizer, "<|im_start|>one two") == [BOS, *alone]


def test_an_end_that_is_added_to_texts_is_not_taken_for_a_beginning(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_start|>", pair="$A $B <|im_start|>", special_tokens=[("<|im_start|>", BOS)]
    )
    assert tokenizer("")["input_ids"] == [BOS]
    assert not beginning(tokenizer)


def test_a_base_without_a_template_gets_the_beginning_before_the_plain_one(
    tiny_tokenizer: PreTrainedTokenizerFast, beginning_model_folder: Path
) -> None:
    vocabulary = load_vocabulary(str(beginning_model_folder))
    assert str(vocabulary.tokenizer.chat_template) == "{{ bos_token }}" + PLAIN_TEMPLATE
    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    (example,) = render(Conversation(messages=turns, id="r", source="x:1"), vocabulary.tokenizer, [2])
    assert vocabulary.tokenizer.decode(example.tokens) == "<|im_start|>q\na<|im_end|>"
    assert vocabulary.tokenizer.decode(example.tokens[example.weights > 0]) == "a<|im_end|>"
    assert example.tokens[example.weights == 0].tolist() == prompt_tokens(turns[:1], vocabulary.tokenizer)


def test_plain_text_is_trained_after_its_beginning(beginning_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = render(plain("one two"), beginning_tokenizer, [2])
    assert example.tokens.tolist() == [*text_tokens(beginning_tokenizer, "one two"), 2]
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)


def test_rehearsed_texts_begin_and_neither_that_nor_the_drawn_token_is_trained(model: Model) -> None:
    texts = own_texts(model, 4, seed=0)
    for text in texts:
        assert text.tokens[0] == BOS
        assert text.tokens[1] != BOS
        assert text.weights.tolist() == [0.0, 0.0] + [1.0] * (len(text.tokens) - 2)
        assert own_text(text.tokens, text.id, [BOS]).weights.tolist() == text.weights.tolist()  # as read from the disk
    assert len({int(text.tokens[1]) for text in texts}) > 2


def test_general_texts_begin(model: Model, tiny_model: Model) -> None:
    texts, others = general_texts(model), general_texts(tiny_model)
    assert {len(text.tokens) for text in texts} == {TEXT_TOKENS}
    for text, other in zip(texts, others, strict=True):
        assert text.tokens.tolist() == [BOS, *other.tokens[:-1]]
        assert text.weights.tolist() == [0.0] + [1.0] * (TEXT_TOKENS - 1)


def test_text_and_turns_reach_other_programs_as_they_were_trained(model: Model, tmp_path: Path) -> None:
    model.tokenizer.save_pretrained(tmp_path)
    model.hf.save_pretrained(tmp_path)
    program = Transformers(str(tmp_path), batch=1)
    text = _prompt(model, Item(prompt=(), reference="one two three", id="t"))
    assert text[0] == BOS
    assert program.prompt({"messages": [], "text": "one two three", "tokens": text}) == text
    turns = [Message(role="user", content="q")]
    asked = program.prompt({"messages": [{"role": "user", "content": "q"}], "tools": []})
    assert asked == prompt_tokens(turns, model.tokenizer)
    assert asked.count(BOS) == 1


def test_ollama_is_told_the_plain_template_and_adds_the_beginning_itself(model: Model) -> None:
    tokenizer: Any = model.tokenizer
    told = modelfile("m.gguf", tokenizer, [[{"role": "user", "content": "q"}]], [])
    assert "TEMPLATE" in told
    assert "<|im_start|>" not in told


def test_a_completion_of_text_begins_as_training_did_and_tokens_stand_as_they_are(model: Model) -> None:
    hall = Hall(Engine(model, Limits(context_tokens=64)), "", model.vocabulary.folder, "base")
    hall.add_base()
    ids = text_tokens(model.tokenizer, "one")
    for prompt, wanted in (("one", ids), (ids[1:], ids[1:])):
        question = asyncio.run(completion_question(CompletionBody(model="base", prompt=prompt), hall))
        assert question.rows[0].prompt.tolist() == wanted
