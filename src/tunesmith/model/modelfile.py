"""A `Modelfile` for Ollama beside a .gguf file. Ollama runs no Jinja, so the chat template is told in its own words.

The words come from how the template renders marked turns, and are used only if they give every real prompt exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER, _AGAIN = "<<first>>", "<<second>>", "<<third>>", "<<fourth>>"
# As answers were judged. Ollama's own temperature is 0.8, and its penalty of 1.1 keeps answers from copying prompts.
_GREEDY = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1")
USUAL_CONTEXT = 2048  # of older Ollamas; beyond it they drop the beginning of a prompt without a word

Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What a template writes before and after each role's text, and where the model is to answer."""

    around: Mapping[str, tuple[str, str]]
    opening: str
    system: str

    def render(self, turns: Turns) -> str:
        """The prompt as Ollama will write it: it puts the default system turn before turns that have none."""
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        parts = [(*self.around[turn["role"]], turn["content"]) for turn in turns]
        return "".join(before + content + after for before, after, content in parts) + self.opening


def modelfile(
    weights: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Turns], ends: Sequence[str], longest: int = 0
) -> str:
    """The file's text; `longest` are the tokens of the longest row, its answer included.

    Without a TEMPLATE, and saying so, where the chat template cannot be told in Ollama's words.
    """
    lines = [f"FROM ./{weights}"]
    wording = _wording(tokenizer)
    if wording and _fits(wording, tokenizer, prompts):
        lines.append(f'TEMPLATE """{_in_go(wording)}"""')
        lines += [f'SYSTEM """{wording.system}"""'] if wording.system else []
    else:
        lines.append(
            "# The chat template inside the file cannot be told in Ollama's own words. Unless Ollama knows it by"
        )
        lines.append("# itself, prompts will differ from those that were judged: look at `ollama show --modelfile`.")
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    if longest > USUAL_CONTEXT:
        lines.append(f"PARAMETER num_ctx {2 ** math.ceil(math.log2(longest))}")
    return "\n".join([*lines, *_GREEDY, ""])


def _wording(tokenizer: PreTrainedTokenizerBase) -> Wording | None:
    """Read off marked turns; None where the template writes them in another order or refuses them."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    talk = [turn("user", _USER), turn("assistant", _ANSWER), turn("user", _AGAIN)]
    try:
        whole, asked = _text(tokenizer, talk), _text(tokenizer, talk, opens=True)
        answered = _text(tokenizer, talk[:2]).split(_ANSWER)[1]
        told = _text(tokenizer, [turn("system", _SYSTEM), talk[0]])
        start, to_answer, to_user, after_user = _cut(whole, (_USER, _ANSWER, _AGAIN))
        before_system, from_system, _ = _cut(told, (_SYSTEM, _USER))
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError):
        return None
    before_user, before_answer = to_user.removeprefix(answered), to_answer.removeprefix(after_user)
    head = start.removesuffix(before_user)
    after_system = from_system.removesuffix(before_user)
    system = head.removeprefix(before_system).removesuffix(after_system)
    bos = str(tokenizer.bos_token or "")
    if head == bos:  # the beginning of the text is added by whoever tokenises
        system, before_system = "", before_system.removeprefix(bos)
    around = {
        "system": (before_system, after_system),
        "user": (before_user, after_user),
        "assistant": (before_answer, answered),
    }
    return Wording(around=around, opening=asked.removeprefix(whole), system=system)


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """The text around the marks. Raises ValueError where one is missing or stands elsewhere."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        parts.append(before)
    return [*parts, text]


def _fits(wording: Wording, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Turns]) -> bool:
    words = [*wording.opening, *(part for pair in wording.around.values() for part in pair), wording.system]
    if any(mark in part for part in words for mark in ("{{", '"""')):
        return False
    if any(turn["role"] not in wording.around for turns in prompts for turn in turns):
        return False
    bos = str(tokenizer.bos_token or "")
    wanted = [_text(tokenizer, turns, opens=True) for turns in prompts]
    made = [wording.render(turns) for turns in prompts]
    return all(one in (text, text.removeprefix(bos)) for one, text in zip(made, wanted, strict=True))


def _text(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, opens: bool = False) -> str:
    how = {"add_generation_prompt": opens, "enable_thinking": False, "tokenize": False}  # as rows are rendered
    made = tokenizer.apply_chat_template([dict(turn) for turn in turns], **how)  # type: ignore[arg-type]
    assert isinstance(made, str)
    return made


def _in_go(wording: Wording) -> str:
    cases = [
        f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for place, (role, (before, after)) in enumerate(wording.around.items())
    ]
    return "{{ range .Messages }}" + "".join(cases) + "{{ end }}{{ end }}" + wording.opening
