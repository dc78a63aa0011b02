"""What well-known families of models ask of rendering: templates that can think, tool calls, marks before a text."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tunesmith.data.render import prompt_tokens, render
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Example, Message

# What matters here of Qwen3's template: only the last answer gets a block of thoughts, and the prompt gets an empty one
# where it is told not to think.
THINKING = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last and loop.index0 > ns.last %}"
    "{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}"
    "{%- else %}{{- m.content.split('</think>')[-1].lstrip('\n') }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


@pytest.fixture
def thinker(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKING
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def talk(*turns: str) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, turns, strict=False))  # type: ignore[arg-type]
    return Conversation(messages=messages, id="r1", source="rows.jsonl:7")


def trained(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(example.tokens[example.weights > 0])


def context(example: Example) -> list[int]:
    """What stands before the last answer."""
    end = len(example.tokens)
    while example.weights[end - 1]:
        end -= 1
    return example.tokens[:end].tolist()


def test_an_empty_block_of_thoughts_is_served_and_not_trained(thinker: PreTrainedTokenizerFast) -> None:
    row = talk("Capital of France?", "Paris")
    (example,) = render(row, thinker, [2])
    assert trained(example, thinker) == "Paris<|im_end|>"
    assert context(example) == prompt_tokens(row.prompt, thinker)
    assert thinker.decode(context(example)).endswith("assistant\n<think>\n\n</think>\n\n")


def test_every_turn_of_a_template_that_can_think_is_trained_as_it_is_served(thinker: PreTrainedTokenizerFast) -> None:
    row = talk("Hi", "Hello", "Capital of France?", "Paris")
    examples = render(row, thinker, [2])
    assert [trained(example, thinker) for example in examples] == ["Hello<|im_end|>", "Paris<|im_end|>"]
    for turn, example in zip((1, 3), examples, strict=True):
        assert context(example) == prompt_tokens(row.messages[:turn], thinker)


def test_an_answer_with_thoughts_of_its_own_is_refused_and_told_why(thinker: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="(?s)rows.jsonl:7: .*elsewhere.*<think>"):
        render(talk("Capital of France?", "<think>\nEasy.\n</think>\n\nParis"), thinker, [2])
