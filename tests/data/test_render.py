"""What is trained is exactly the answer and its end of turn, in exactly the context that is served."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tunesmith.data.render import prompt_tokens, render
from tunesmith.errors import DataError
from tunesmith.model.load import PLAIN_TEMPLATE
from tunesmith.types import Conversation, Example, Message

FORGETFUL = (  # keeps only the last question and answer, as templates do that drop earlier reasoning
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages[ns.last:] %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ELSEWHERE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}now you: {% endif %}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def row(*turns: tuple[str, str], **more: object) -> Conversation:
    messages = tuple(Message(role=role, content=content) for role, content in turns)  # type: ignore[arg-type]
    return Conversation(messages=messages, id="r1", source="rows.jsonl:7", **more)  # type: ignore[arg-type]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def trained(example: Example) -> list[int]:
    return example.tokens[example.weights > 0].tolist()


def answers(example: Example) -> list[tuple[list[int], list[int]]]:
    """Each trained run of tokens with everything before it."""
    found, start = [], None
    for place, weight in enumerate([*example.weights.tolist(), 0.0]):
        if weight and start is None:
            start = place
        if not weight and start is not None:
            found.append((example.tokens[:start].tolist(), example.tokens[start:place].tolist()))
            start = None
    return found


def check_served(conversation: Conversation, examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    """Every answer is trained once, in the context that the server sends for the turns before it."""
    turns = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    found = [pair for example in examples for pair in answers(example)]
    assert len(found) == len(turns)
    for turn, (context, answer) in zip(turns, found, strict=True):
        assert context == prompt_tokens(conversation.messages[:turn], tokenizer, conversation.tools)
        assert tokenizer.decode(answer).startswith(conversation.messages[turn].content)


def test_the_trained_ids_are_the_answer_and_its_end_of_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = render(row(("user", "Upper case of: ab"), ("assistant", "AB")), tiny_tokenizer, [2])
    assert trained(example) == [*ids(tiny_tokenizer, "AB"), 2]
    assert tiny_tokenizer.decode(example.tokens.tolist()) == (
        "<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n"
        "<|im_start|>user\nUpper case of: ab<|im_end|>\n<|im_start|>assistant\nAB<|im_end|>"
    )


def test_a_greeting_before_any_question_is_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    greeted = row(("assistant", "Hello!"), ("user", "q"), ("assistant", "a"))
    (example,) = render(greeted, tiny_tokenizer, [2])
    assert answers(example) == [(prompt_tokens(greeted.prompt, tiny_tokenizer), [*ids(tiny_tokenizer, "a"), 2])]
    assert "Hello!" in tiny_tokenizer.decode(example.tokens.tolist())


def test_pad_is_not_the_end_of_turn_and_is_never_trained(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_examples: list[Example]
) -> None:
    assert tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    for example in tiny_examples:
        assert trained(example)[-1] == tiny_tokenizer.eos_token_id
        assert tiny_tokenizer.pad_token_id not in example.tokens


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "q"), ("assistant", "a")],
        [("system", "Be brief."), ("user", "q"), ("assistant", "a")],
        [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b c d")],
        [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "\n\nb"), ("user", "x")],
        [
            ("user", "q"),
            ("assistant", "a"),
            ("tool", "42"),
            ("assistant", "forty-two"),
            ("user", "?"),
            ("assistant", "!"),
        ],
    ],
    ids=["default system", "given system", "two turns", "no last answer", "tool result"],
)
def test_each_answer_is_trained_once_in_its_served_context(
    turns: list[tuple[str, str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    conversation = row(*turns)
    examples = render(conversation, tiny_tokenizer, [2])
    assert len(examples) == 1
    check_served(conversation, examples, tiny_tokenizer)
    for _, answer in answers(examples[0]):
        assert answer[-1] == 2
        assert answer.count(2) == 1


def test_a_template_that_drops_earlier_turns_gives_the_later_answer_its_own_example(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = with_template(tiny_tokenizer, FORGETFUL)
    conversation = row(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    examples = render(conversation, tokenizer, [2])
    assert [example.id for example in examples] == ["r1", "r1/1"]
    assert "q" not in tokenizer.decode(examples[1].tokens.tolist()).replace("user", "")
    check_served(conversation, examples, tokenizer)


def test_a_template_without_end_of_turn_gets_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, ENDLESS)
    conversation = row(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    examples = render(conversation, tokenizer, [2])
    check_served(conversation, examples, tokenizer)
    assert [trained(example)[-1] for example in examples] == [2, 2]


def test_a_base_without_a_chat_template_joins_turns_and_ends_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, PLAIN_TEMPLATE)
    conversation = row(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    (example,) = render(conversation, tokenizer, [2])
    check_served(conversation, [example], tokenizer)
    assert tokenizer.decode(example.tokens.tolist()) == "q\na<|im_end|>\nr\nb<|im_end|>"
    assert trained(example) == [*ids(tokenizer, "a"), 2, *ids(tokenizer, "b"), 2]


def test_a_tool_call_is_trained_as_the_template_writes_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, WITH_TOOLS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = (Message(role="user", content="1+1"), Message(role="assistant", content="", tool_calls=(call,)))
    conversation = Conversation(messages=turns, id="r1", source="rows.jsonl:7", tools=({"name": "add"},))
    (example,) = render(conversation, tokenizer, [2])
    context, answer = answers(example)[0]
    assert context == prompt_tokens(turns[:1], tokenizer, conversation.tools)
    assert '"name": "add"' in tokenizer.decode(context)
    written = tokenizer.decode(answer)
    assert written.startswith("<call>")
    assert written.endswith("</call><|im_end|>")


def test_plain_text_is_trained_throughout_and_ends(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = render(Conversation(messages=(), text="one two", id="t", source="rows.txt:1"), tiny_tokenizer, [2])
    assert example.tokens.tolist() == [*ids(tiny_tokenizer, "one two"), 2]
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)


@pytest.mark.parametrize("content", ["before<|im_end|>after", "<|im_end|>", "ends early<|im_end|>"])
def test_an_answer_that_spells_the_end_of_turn_is_refused_with_its_line(
    content: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: an answer holds '<\|im_end\|>'"):
        render(row(("user", "q"), ("assistant", content)), tiny_tokenizer, [2])


def test_a_tool_call_that_spells_the_end_of_turn_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    turns = (Message(role="user", content="q"), Message(role="assistant", content="", tool_calls=(call,)))
    tokenizer = with_template(tiny_tokenizer, WITH_TOOLS)
    with pytest.raises(DataError, match="rows.jsonl:7: an answer holds"):
        render(Conversation(messages=turns, id="r", source="rows.jsonl:7"), tokenizer, [2])


def test_an_empty_answer_trains_its_end_of_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = render(row(("user", "q"), ("assistant", "")), tiny_tokenizer, [2])
    assert trained(example) == [2]


def test_a_template_that_writes_the_answer_elsewhere_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="rows.jsonl:7: .*elsewhere"):
        render(row(("user", "q"), ("assistant", "a")), with_template(tiny_tokenizer, ELSEWHERE), [2])


def test_a_template_that_does_not_know_a_role_names_the_row(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(DataError, match="rows.jsonl:7: .*no system role"):
        render(row(("system", "s"), ("user", "q"), ("assistant", "a")), with_template(tiny_tokenizer, template), [2])


def test_the_weights_say_which_tokens_are_trained_and_nothing_else(tiny_examples: list[Example]) -> None:
    for example in tiny_examples:
        assert example.weights.dtype == np.float32
        assert set(example.weights.tolist()) == {0.0, 1.0}
        assert example.weights[0] == 0
