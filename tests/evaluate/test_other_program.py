"""Other programs get the prompts that were trained and judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer

from tunesmith.data.render import prompt_tokens
from tunesmith.evaluate.other_program import Transformers
from tunesmith.model.load import NO_THOUGHTS, load_vocabulary
from tunesmith.types import Message

THINKING = (
    "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


@pytest.fixture
def thinking(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a template that can think."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "thinking")
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


def test_transformers_asks_without_thoughts_as_training_did_though_nobody_tells_it(thinking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    load_vocabulary(str(thinking)).tokenizer.save_pretrained(thinking)  # as models and adapters are handed over
    prompt = Transformers(str(thinking), batch=1).prompt({"messages": [{"role": "user", "content": "q"}], "tools": []})
    assert prompt == prompt_tokens([Message(role="user", content="q")], tokenizer)
    assert tokenizer.decode(prompt) == "q<|im_end|><think></think>"


def test_a_template_says_by_itself_that_there_are_no_thoughts_unless_it_is_told_otherwise() -> None:
    template = jinja2.Environment(trim_blocks=True, autoescape=False).from_string(NO_THOUGHTS + THINKING)
    turns = [{"role": "user", "content": "q"}]
    assert template.render(messages=turns) == "q<|im_end|><think></think>"
    assert template.render(messages=turns, enable_thinking=True) == "q<|im_end|>"
