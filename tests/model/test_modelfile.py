"""The Modelfile tells Ollama the model's chat template in Ollama's own words, or says that it cannot."""

from __future__ import annotations

import copy
from typing import Any

from tunesmith.model.modelfile import modelfile

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}
TALK = [USER, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n\n{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_template_and_its_default_system_turn_are_told(tiny_tokenizer: Any) -> None:
    told = modelfile("m.gguf", tiny_tokenizer, [[USER], [SYSTEM, USER], TALK], ["<|im_end|>"])
    assert told.startswith("FROM ./m.gguf\nTEMPLATE ")
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if' in told
    assert told.count("<|im_start|>assistant\n") == 2  # a turn's beginning, and the opening at the end
    assert '{{ end }}{{ end }}<|im_start|>assistant\n"""' in told
    assert 'SYSTEM """You are a tiny assistant."""' in told
    assert 'PARAMETER stop "<|im_end|>"\n' in told


def test_answers_are_greedy_and_may_copy_their_prompt(tiny_tokenizer: Any) -> None:
    told = modelfile("m.gguf", tiny_tokenizer, [[USER]], [])
    assert told.endswith("\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n")


def test_rows_longer_than_the_usual_context_ask_for_a_longer_one(tiny_tokenizer: Any) -> None:
    assert "num_ctx" not in modelfile("m.gguf", tiny_tokenizer, [[USER]], [], longest=2048)
    assert "PARAMETER num_ctx 4096\n" in modelfile("m.gguf", tiny_tokenizer, [[USER]], [], longest=2100)


def test_the_beginning_of_text_is_left_to_whoever_tokenises(tiny_tokenizer: Any) -> None:
    told = modelfile("m.gguf", with_template(tiny_tokenizer, LLAMA_3), [[USER], [SYSTEM, USER], TALK], [])
    assert 'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<system>' in told
    assert "SYSTEM" not in told
    assert "<|im_start|>" not in told


def test_a_template_that_does_more_than_join_turns_is_not_told(tiny_tokenizer: Any) -> None:
    for template in (
        LLAMA_3.replace("m['content']", "m['content'] | upper"),
        LLAMA_3.replace("{% for m in messages %}", "{{ messages | length }}{% for m in messages %}"),
        "{{ raise_exception('no') }}",
    ):
        told = modelfile("m.gguf", with_template(tiny_tokenizer, template), [TALK], [])
        assert "TEMPLATE" not in told
        assert "cannot be told in Ollama's own words" in told


def test_a_turn_of_a_role_that_was_not_read_off_is_not_told(tiny_tokenizer: Any) -> None:
    assert "TEMPLATE" not in modelfile("m.gguf", tiny_tokenizer, [[USER, {"role": "tool", "content": "3"}]], [])


def test_a_template_that_can_think_is_told_as_it_is_served(tiny_tokenizer: Any) -> None:
    template = LLAMA_3.replace(
        "<assistant>\n\n{% endif", "<assistant>\n\n{% if enable_thinking is false %}[]{% endif %}{% endif"
    )
    told = modelfile("m.gguf", with_template(tiny_tokenizer, template), [[USER], TALK], [])
    assert '{{ end }}{{ end }}<assistant>\n\n[]"""' in told
