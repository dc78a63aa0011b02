"""What well-known families of models ask of rendering: templates that can think, tool calls, marks before a text."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.layout import conversation_id, to_messages
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


def test_a_base_that_thinks_before_every_answer_is_refused_and_told_why(thinker: PreTrainedTokenizerFast) -> None:
    # As DeepSeek R1: the prompt ends in an open block of thoughts, which the answers of a conversation lack.
    thinker.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    for answer in ("Paris", "<think>\nFrance\n</think>\n\nParis"):
        with pytest.raises(DataError, match="(?s)rows.jsonl:7: this base thinks before every answer.*answer without"):
            render(talk("Capital of France?", answer), thinker, [2])


def test_an_answer_with_thoughts_of_its_own_is_refused_and_told_why(thinker: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="(?s)rows.jsonl:7: .*elsewhere.*<think>"):
        render(talk("Capital of France?", "<think>\nEasy.\n</think>\n\nParis"), thinker, [2])


# The part of Qwen2.5's and Hermes' templates that writes calls: a string would be quoted once more.
CALLING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}"
    "{{- '<call>' + call.name + ' ' }}{{- call.arguments | tojson }}{{- '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture
def caller(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CALLING
    return tokenizer


def calling(call: dict[str, object]) -> Conversation:
    turns = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages = to_messages(turns, "messages", "rows.jsonl:7")
    return Conversation(messages=messages, id=conversation_id(messages), source="rows.jsonl:7")


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Zürich", "days": [1, 2]}', '{"city": "Zürich", "days": [1, 2]}'),
        ({"city": "Paris"}, '{"city": "Paris"}'),
        ("{}", "{}"),
        ("", '""'),
        ("[1]", '"[1]"'),
        ('{"city": ', json.dumps('{"city": ')),
        ("[" * 100_000, None),
    ],
    ids=["object in a string", "object", "no arguments", "empty", "a list", "half", "too deep"],
)
@pytest.mark.parametrize("nested", [True, False], ids=["function", "bare"])
def test_arguments_that_are_an_object_in_a_string_are_trained_as_that_object(
    nested: bool, arguments: object, written: str | None, caller: PreTrainedTokenizerFast
) -> None:
    function = {"name": "weather", "arguments": arguments}
    row = calling({"id": "c1", "type": "function", "function": function} if nested else function)
    (example,) = render(row, caller, [2])
    wanted = json.dumps(arguments) if written is None else written
    assert trained(example, caller) == f"<call>weather {wanted}</call><|im_end|>"


def test_calls_of_earlier_turns_are_served_as_they_were_trained(caller: PreTrainedTokenizerFast) -> None:
    row = calling({"function": {"name": "weather", "arguments": '{"city": "Paris"}'}})
    messages = (*row.messages, Message(role="tool", content="rain"), Message(role="assistant", content="Rain."))
    (example,) = render(replace(row, messages=messages), caller, [2])
    assert context(example) == prompt_tokens(messages[:-1], caller)
    assert '<call>weather {"city": "Paris"}</call>' in caller.decode(context(example))


def test_a_row_keeps_its_calls_and_its_id_as_they_were_written(caller: PreTrainedTokenizerFast) -> None:
    text = '{"city": "Paris"}'
    row = calling({"function": {"name": "weather", "arguments": text}})
    before = row.id
    render(row, caller, [2])
    assert row.messages[-1].tool_calls[0] == {"function": {"name": "weather", "arguments": text}}
    assert conversation_id(row.messages) == before == "7cac50de8a014623"


def test_an_end_of_turn_that_only_the_object_spells_is_refused(caller: PreTrainedTokenizerFast) -> None:
    row = calling({"function": {"name": "say", "arguments": r'{"text": "\u003c|im_end|>"}'}})
    with pytest.raises(DataError, match="rows.jsonl:7: an answer holds"):
        render(row, caller, [2])


def test_a_call_that_the_template_leaves_out_is_refused_with_its_line(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = calling({"type": "function", "function": {"name": "weather", "arguments": "{}"}})
    with pytest.raises(DataError, match=r"(?s)^rows.jsonl:7: .* writes no tool calls\n.*as text"):
        render(row, tiny_tokenizer, [2])


@pytest.mark.parametrize("begins", [(), (Message(role="system", content="Be brief."),)], ids=["user", "system"])
def test_tools_that_the_template_leaves_out_are_refused_with_their_line(
    begins: tuple[Message, ...], caller: PreTrainedTokenizerFast
) -> None:
    row = talk("Weather?", "Rain")
    row = replace(row, messages=(*begins, *row.messages), tools=({"type": "function", "function": {"name": "f"}},))
    with pytest.raises(DataError, match="rows.jsonl:7: .* writes no tool definitions"):
        render(row, caller, [2])


# Definitions only in the system's turn, as some templates have them.
IN_THE_SYSTEM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['role'] == 'system' and tools %}{{ tools | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_written_beside_a_system_only_are_refused_without_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = IN_THE_SYSTEM
    row = replace(talk("Weather?", "Rain"), tools=({"name": "weather_in"},))
    with pytest.raises(DataError, match="no tool definitions"):
        render(row, tokenizer, [2])
    (example,) = render(replace(row, messages=(Message(role="system", content="s"), *row.messages)), tokenizer, [2])
    assert "weather_in" in tokenizer.decode(context(example))


def test_a_template_that_refuses_tools_speaks_for_itself(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ raise_exception('one tool at most') }}{% endif %}" + CALLING
    with pytest.raises(DataError, match="rows.jsonl:7: .*one tool at most"):
        render(replace(talk("Weather?", "Rain"), tools=({"name": "f"},)), tokenizer, [2])


def test_whether_a_template_writes_tools_is_found_out_once(
    caller: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = calling({"function": {"name": "weather", "arguments": {}}})
    render(row, caller, [2])
    rendered: list[object] = []
    written = caller.apply_chat_template
    monkeypatch.setattr(
        caller, "apply_chat_template", lambda turns, **how: rendered.append(turns) or written(turns, **how)
    )
    render(row, caller, [2])
    assert len(rendered) == 2  # what stands before the answer, and with it


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
GLUED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # an answer may join the question's last word


@pytest.fixture(scope="module")
def marking() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2, Mistral and Zephyr have it: a text is normalised to begin with the mark of a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("▁[]/INSTabcdefghijklmnopqrstuvwxyzPC?<|>\n"),
    )
    tokenizer.train_from_iterator(["▁answer Paris▁Paris▁question▁is▁the[/INST][INST]▁"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=ZEPHYR
    )


@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL], ids=["zephyr", "mistral"])
def test_a_tokenizer_that_marks_the_beginning_of_a_text_does_not_mark_the_answers(
    template: str, marking: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(marking)
    tokenizer.chat_template = template
    row = talk("is the question?", "Paris", "is the answer?", "Paris is")
    (example,) = render(row, tokenizer, [2])
    turns = [{"role": message.role, "content": message.content} for message in row.messages]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert example.tokens.tolist() == whole[: len(example.tokens)]
    assert context(example) == prompt_tokens(row.prompt, tokenizer)
    assert [said.strip() for said in trained(example, tokenizer).split("</s>")] == ["Paris", "Paris is", ""]
    (first,) = render(replace(row, messages=row.messages[:2]), tokenizer, [2])
    assert first.tokens.tolist() == example.tokens[: len(first.tokens)].tolist()
    assert context(first) == prompt_tokens(row.messages[:1], tokenizer)


def test_where_the_answer_joins_the_questions_last_word_it_follows_what_is_served(
    marking: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.deepcopy(marking)
    tokenizer.chat_template = GLUED
    row = talk("the quest", "ion")
    (example,) = render(row, tokenizer, [2])
    assert context(example) == prompt_tokens(row.prompt, tokenizer)
    assert example.tokens.tolist() != [*tokenizer("the question", add_special_tokens=False)["input_ids"], 2]
    assert trained(example, tokenizer) == "ion</s>"
