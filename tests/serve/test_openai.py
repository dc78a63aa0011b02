"""The server as the official client sees it: every parameter, whole and streamed, alone and in a crowd."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tunesmith.data.render import prompt_tokens
from tunesmith.model.adapters import load_adapter
from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling, sample
from tunesmith.types import Completion, Message
from tunesmith.world import World

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Runs, Serve, Serving

TOKENS = 24
TURNS: list[Any] = [{"role": "user", "content": "Upper case of: abc"}]
NAMES = ["a", "b", "lively"]


@pytest.fixture
def client(serving: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def offline(runs: Runs) -> dict[str, Model]:
    """The same models for the sampler that evaluates, each with its adapter alone."""
    models = {name: load(str(runs.base), World()) for name in NAMES}
    load_adapter(models["a"], runs.a / "adapter")
    load_adapter(models["b"], runs.b / "adapter")
    return models


def chat(client: OpenAI, model: str = "a", text: str = TURNS[0]["content"], **changes: Any) -> ChatCompletion:
    asked: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    return client.chat.completions.create(model=model, **{**asked, **changes})


def text_of(reply: ChatCompletion, index: int = 0) -> str:
    content = reply.choices[index].message.content
    assert content is not None
    return content


def evaluated(model: Model, text: str, **how: Any) -> Completion:
    """What the sampler that evaluates answers."""
    prompt = np.array(prompt_tokens([Message(role="user", content=text)], model.tokenizer))
    (one,) = sample(model, [prompt], Sampling(**{"max_new_tokens": TOKENS, **how}))
    return one


def streamed(client: OpenAI, **changes: Any) -> list[Any]:
    return list(chat(client, stream=True, **changes))  # type: ignore[arg-type]


def test_models_are_listed_by_the_names_of_their_runs(client: OpenAI, runs: Runs) -> None:
    assert [model.id for model in client.models.list().data] == ["lively", "a", "b"]
    one = client.models.retrieve("a")
    assert (one.id, one.object, one.owned_by) == ("a", "model", "tunesmith")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("c")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", NAMES)
def test_a_greedy_reply_is_what_the_run_would_have_been_evaluated_on(
    name: str, client: OpenAI, offline: dict[str, Model]
) -> None:
    reply, wanted = chat(client, name), evaluated(offline[name], TURNS[0]["content"])
    assert text_of(reply) == wanted.text
    assert reply.choices[0].finish_reason == ("length" if wanted.stop == "length" else "stop")
    prompt = prompt_tokens([Message(**TURNS[0])], offline[name].tokenizer)
    assert reply.usage
    assert reply.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(wanted.tokens),
        "total_tokens": len(prompt) + len(wanted.tokens),
    }
    assert (reply.model, reply.object, reply.id[:9]) == (name, "chat.completion", "chatcmpl-")


def test_adapters_and_base_answer_differently(client: OpenAI) -> None:
    assert len({text_of(chat(client, name)) for name in NAMES}) == 3


def test_a_seeded_reply_is_drawn_as_the_sampler_draws_it(client: OpenAI, offline: dict[str, Model]) -> None:
    warm = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    wanted = evaluated(offline["b"], TURNS[0]["content"], **warm)
    assert text_of(chat(client, "b", **warm)) == wanted.text
    assert text_of(chat(client, "b", **{**warm, "seed": 6})) != wanted.text


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_any_seed_of_64_bits_is_one(client: OpenAI, seed: int) -> None:
    first, second = (text_of(chat(client, temperature=1, seed=seed)) for _ in range(2))
    assert first == second


def test_without_a_seed_or_temperature_replies_differ(client: OpenAI) -> None:
    assert len({text_of(chat(client, temperature=None)) for _ in range(3)}) > 1


def test_a_tiny_temperature_or_top_p_is_greedy(client: OpenAI) -> None:
    greedy = text_of(chat(client))
    assert text_of(chat(client, temperature=1e-300)) == greedy
    assert text_of(chat(client, temperature=1, top_p=1e-300)) == greedy


def test_n_choices_are_n_draws_and_the_first_is_that_of_one(client: OpenAI) -> None:
    reply = chat(client, n=5, temperature=1.2, seed=3)
    texts = [text_of(reply, index) for index in range(5)]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3, 4]
    assert len(set(texts)) == 5
    assert texts[0] == text_of(chat(client, temperature=1.2, seed=3))
    assert reply.usage
    assert reply.usage.prompt_tokens == chat(client).usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_reply_is_longer_than_allowed(name: str, client: OpenAI) -> None:
    reply = chat(client, **{"max_tokens": openai.omit, name: 3})
    assert reply.usage
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (3, "length")


def test_without_a_limit_a_reply_ends_with_its_turn_or_the_context(client: OpenAI) -> None:
    reply = chat(client, max_tokens=openai.omit)
    assert reply.usage
    assert reply.choices[0].finish_reason == "stop" or reply.usage.total_tokens == 256


@pytest.mark.parametrize("many", [False, True])
def test_a_reply_ends_before_a_stop_string_even_between_tokens(many: bool, client: OpenAI) -> None:
    greedy = text_of(chat(client))
    assert len(greedy) > 8
    stop = greedy[4:7]
    reply = chat(client, stop=["never said", stop, "nor this", "or that"] if many else stop)
    assert text_of(reply) == greedy[: greedy.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    pieces = streamed(client, stop=stop)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text_of(reply)
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_sampler_with_their_rivals(
    client: OpenAI, offline: dict[str, Model]
) -> None:
    wanted = evaluated(offline["a"], TURNS[0]["content"])
    logprobs = chat(client, logprobs=True, top_logprobs=4).choices[0].logprobs
    assert logprobs
    assert logprobs.content
    shown = wanted.tokens[:-1] if wanted.stop == "end_of_turn" else wanted.tokens
    assert [one.token for one in logprobs.content] == [offline["a"].tokenizer.decode([t]) for t in shown]
    np.testing.assert_allclose([one.logprob for one in logprobs.content], wanted.log_probs[: len(shown)], atol=1e-4)
    for one in logprobs.content:
        rivals = [rival.logprob for rival in one.top_logprobs]
        assert len(rivals) == 4
        assert rivals == sorted(rivals, reverse=True)
        assert rivals[0] == one.logprob
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    plain = chat(client, logprobs=True).choices[0].logprobs
    assert plain
    assert plain.content
    assert plain.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_a_stream_says_the_same_in_pieces_and_ends_with_usage(client: OpenAI) -> None:
    changes: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 9, "logprobs": True, "top_logprobs": 2}
    reply = chat(client, **changes)
    *pieces, last = streamed(client, stream_options={"include_usage": True}, **changes)
    assert last.choices == []
    assert last.usage == reply.usage
    assert all(piece.usage is None and piece.id == last.id for piece in pieces)
    for index, choice in enumerate(reply.choices):
        own = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [choice.finish_reason]
        words = [word for piece in own if piece.logprobs for word in piece.logprobs.content or []]
        assert choice.logprobs
        assert words == choice.logprobs.content


def test_the_clients_own_helper_reads_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(model="a", messages=TURNS, temperature=0, max_tokens=TOKENS) as events:
        for _ in events:
            pass
        assert events.current_completion_snapshot.choices[0].message.content == text_of(chat(client))


def test_a_turn_may_be_parts(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Upper case of: "}, {"type": "text", "text": "abc"}]
    assert text_of(chat(client, messages=[{"role": "user", "content": parts}])) == text_of(chat(client))


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Call f."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "42"},
]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def test_turns_may_have_tools_and_their_answers(tools_model_folder: Path, serve: Serve) -> None:
    server = serve(tools_model_folder, context_tokens=512)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        name = one.models.list().data[0].id
        replies = [
            chat(one, name, messages=CALLED, tools=TOOLS, tool_choice=choice, max_tokens=4)
            for choice in ("auto", "none")
        ]
    assert all(reply.choices[0].message.role == "assistant" for reply in replies)
    assert replies[0].usage
    assert replies[1].usage
    assert replies[0].usage.prompt_tokens > replies[1].usage.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "param", "missing"),
    [({"tools": TOOLS}, "tools", "tool definitions"), ({"messages": CALLED}, "messages", "tool calls")],
    ids=["tools", "calls"],
)
def test_what_the_template_leaves_out_of_tools_is_refused_by_name(
    changes: dict[str, Any], param: str, missing: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"template writes no {missing}") as caught:
        chat(client, **changes)
    assert caught.value.param == param


def test_tools_that_shall_not_be_called_need_no_place_in_the_template(client: OpenAI) -> None:
    assert text_of(chat(client, tools=TOOLS, tool_choice="none")) == text_of(chat(client))


def test_parameters_that_ask_for_nothing_are_accepted(client: OpenAI) -> None:
    nothing: dict[str, Any] = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "store": False,
        "metadata": {"team": "x"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "user": "u",
        "functions": None,
        "extra_body": {"top_k": None},
    }
    assert text_of(chat(client, **nothing)) == text_of(chat(client))


@pytest.mark.parametrize("options", [None, {}, {"enable_thinking": False}, {"enable_thinking": None}])
def test_options_of_the_template_that_ask_for_what_is_done_anyway_are_accepted(options: Any, client: OpenAI) -> None:
    assert text_of(chat(client, extra_body={"chat_template_kwargs": options})) == text_of(chat(client))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable_thinking": True}, "enable_thinking: models answer without thoughts here, as they were trained"),
        ({"enable_thinking": 1}, "enable_thinking: "),
        ({"custom": 1}, "custom: is not a field that this server knows"),
    ],
)
def test_options_of_the_template_that_would_change_a_prompt_are_refused_and_told_why(
    options: Any, reason: str, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"chat_template_kwargs\.{reason}") as caught:
        chat(client, extra_body={"chat_template_kwargs": options})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"store": True}, "store"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
    ids=str,
)
def test_what_would_not_be_honoured_is_refused_by_name(changes: dict[str, Any], param: str, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **changes)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(client: OpenAI) -> None:
    for changes in ({"max_tokens": 255}, {"messages": [{"role": "user", "content": "x" * 300}]}):
        with pytest.raises(openai.BadRequestError, match="256 tokens") as caught:
            chat(client, **changes)
        assert caught.value.code == "context_length_exceeded"


def test_completions_continue_text_or_tokens_without_a_template(client: OpenAI, offline: dict[str, Model]) -> None:
    tokenizer = offline["a"].tokenizer
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Upper case", "abc")]
    wanted = [one.text for one in sample(offline["a"], [np.array(t) for t in tokens], Sampling(max_new_tokens=16))]
    for prompt, count in (("Upper case", 1), (["Upper case", "abc"], 2), (tokens[0], 1), (tokens, 2)):
        reply = client.completions.create(model="a", prompt=prompt, temperature=0)  # type: ignore[arg-type]
        assert [choice.text for choice in reply.choices] == wanted[:count]
        assert reply.object == "text_completion"
    reply = client.completions.create(model="a", prompt=["Upper case", "abc"], temperature=1, n=2, best_of=2, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]


def test_completions_list_log_probabilities_and_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "a", "prompt": "abc", "temperature": 0, "max_tokens": 8, "logprobs": 3}
    reply = client.completions.create(**asked)
    words = reply.choices[0].logprobs
    assert words
    assert words.tokens
    assert len(words.tokens) == len(words.token_logprobs or []) == len(words.text_offset or [])
    assert all(words.top_logprobs or [])
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == reply.choices[0].text
    assert pieces[-1].usage == reply.usage
    assert [
        t for piece in pieces[:-1] if piece.choices[0].logprobs for t in piece.choices[0].logprobs.tokens or []
    ] == (words.tokens)


def test_of_rivals_that_are_spelled_alike_the_likeliest_is_listed(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "a", "prompt": "abc", "temperature": 0, "max_tokens": 64, "logprobs": 5}
    words = client.completions.create(**asked).choices[0].logprobs
    assert words
    assert words.top_logprobs
    assert any(len(rivals) < 5 for rivals in words.top_logprobs)  # halves of characters are all shown as one sign
    greedy = [rivals[text] for text, rivals in zip(words.tokens or [], words.top_logprobs, strict=True)]
    assert greedy == words.token_logprobs


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"model": "c"}, "model"),
    ],
    ids=str,
)
def test_a_completion_that_cannot_be_is_refused_by_name(changes: dict[str, Any], param: str, client: OpenAI) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.completions.create(**{"model": "a", "prompt": "x", **changes})
    assert caught.value.param == param


@pytest.mark.parametrize("warm", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "seeded"])
def test_replies_in_a_crowd_are_those_of_one_client_alone(warm: dict[str, Any], client: OpenAI) -> None:
    """16 clients at once over two adapters and their base: log-probabilities too, to the last bit."""

    def ask(number: int) -> Any:
        asked: dict[str, Any] = {"max_tokens": 4 + 5 * (number % 6), "logprobs": True, **warm}
        reply = chat(client, NAMES[number % 3], f"Say {'x' * (number % 12)} {number % 24}", **asked)
        return reply.choices[0].model_dump()

    alone = [ask(number) for number in range(24)]
    with ThreadPoolExecutor(16) as pool:
        for crowd in [list(pool.map(ask, range(48))) for _ in range(2)]:
            assert crowd == alone * 2
