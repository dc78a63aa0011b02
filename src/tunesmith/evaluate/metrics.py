"""Grades of an answer: one number per held-out item, so that every metric can be paired and given an interval.

A metric is a plain function of the answer and the reference. `find_metric` turns the name in a recipe into a Grade,
which scores answers in evaluation and rewards them in training. Outer whitespace never counts.
Metrics that need the model's probabilities (MODEL_METRICS) are computed where the model is: in `measure`.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import regex
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ..errors import DataError, RecipeError
from ..recipe import TaskSpec
from ..types import Grade, Item
from .calls import Call, parse_calls, parse_json, same_call, same_value
from .own import own_grade

BINARY_TEXT_METRICS = (
    "exact_match",
    "normalised_match",
    "contains",
    "numeric_match",
    "valid_json",
    "json_match",
    "call_match",
    "call_name_match",
    "regex",
)
TEXT_METRICS = (*BINARY_TEXT_METRICS, "token_f1", "rouge_l", "bleu", "chrf", "placeholder_f1")
# Metrics to which words beyond the reference are of no use. By the others, an answer may be right after a preamble.
WHOLE_ANSWER_METRICS = frozenset(
    {"exact_match", "normalised_match", "token_f1", "rouge_l", "bleu", "chrf", "placeholder_f1"}
)
# Metrics that compare what they read in the reference, a number, JSON or calls, and cannot grade where there is none.
READING_METRICS = frozenset({"numeric_match", "json_match", "call_match", "call_name_match"})
MODEL_METRICS = frozenset({"completion_loss", "choice_accuracy"})
LOWER_IS_BETTER = frozenset({"completion_loss", "general_loss", "kl", "kl_from_base"})
REGEX_LIMIT_SECONDS = 1.0

Metric = Callable[[str, str], float]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4})?(?:\s*%)?"
)
# Dollar, cent to yen, baht, Unicode's block of currency marks, wide forms.
_CURRENCY = r"$\u00a2-\u00a5\u0e3f\u20a0-\u20cf＄￡￥￦"
_MONEY = rf"[A-Za-z]{{0,2}}[{_CURRENCY}]"  # also US$, R$
# The sign of `-$3`, but not the dash between two amounts: `$3-$5`, `3€-€5`, in LaTeX `$3$-$5$`.
_SIGNED_MONEY = re.compile(rf"(?<![\w.{_CURRENCY}])([-+]){_MONEY}\s?(?=\.?\d)")
# What joins a number to the one before it: a decimal comma, a fraction (in LaTeX too), a date, a time, a range.
_JOINED = re.compile(r"\d(?:[,/:\u2013-]|\}\{)\Z")
_DIGIT_GROUP_GAP = re.compile(r"(?<=\d)[\u00a0\u2009\u202f'’_](?=\d{3}(?!\d))")
# Kept: a decimal point, thousands comma or colon inside a number, and a minus sign. Group 1: everything else.
_PUNCTUATION = re.compile(rf"(?<=\d)[.,:](?=\d)|(?<![\w.])-(?=(?:{_MONEY})?\d)|([^\w\s]|_)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A letter of a script without spaces between words, with the vowel and tone marks on it.
_UNSPACED_LETTER = regex.compile(r"(?=\p{L})[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*")
_WORD = regex.compile(r"(?:\p{L}\p{M}*|\p{N})+")
_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")


def higher_is_better(name: str) -> bool:
    """Whether a larger value of this metric is the better one. A user's own function is taken to be."""
    return name not in LOWER_IS_BETTER


def is_binary(name: str) -> bool:
    """Whether each item scores 0 or 1, so that the mean is a share of items."""
    return name in BINARY_TEXT_METRICS or name in {"choice_accuracy", "pair_accuracy", "general_accuracy"}


def exact_match(answer: str, reference: str) -> float:
    """1 where the answer is the reference, character for character."""
    return float(answer.strip() == reference.strip())


def normalised_match(answer: str, reference: str) -> float:
    """1 where both agree once case, whitespace and punctuation are folded. Numbers keep their sign and point."""
    folded = _fold(reference)
    return float(_fold(answer) == folded) if folded else exact_match(answer, reference)


def contains(answer: str, reference: str) -> float:
    """1 where the reference stands in the answer, case and whitespace folded, not as a part of a longer word or number.

    "5" stands in "It is 5." but not in "1.5", nor "15" in "15,000".
    """
    needle, haystack = (" ".join(text.casefold().split()) for text in (reference, answer))
    if not needle:
        return float(not haystack)
    before = _edge(needle[0], r"(?<!\w)", r"(?<!\d[.,])")
    after = _edge(needle[-1], r"(?!\w)", r"(?![.,]\d)")
    return float(re.search(before + re.escape(needle) + after, haystack) is not None)


def numeric_match(answer: str, reference: str) -> float:
    """1 where the last number of the answer equals the last number of the reference.

    Commas group thousands; a sign may stand before a currency mark, as in `-$3`. Integers must agree exactly, others
    to one part in a million. Where only one side has a percent sign, `12 %` equals both 12 and 0.12. Raises DataError
    for a reference without a number, or that ends in one of which a part alone would be read, as `3,5` or `1/2`.
    """
    expected, given = _last_number(reference), _last_number(answer)
    if expected is None:
        raise DataError(
            f"the reference {_short(reference)} holds no number", fix="Use another metric, or mend the row."
        )
    if expected.is_part:
        fix = "Write one number, such as 3.5 for 3,5 and 0.5 for 1/2, or use exact_match or normalised_match."
        raise DataError(f"the reference {_short(reference)} joins several numbers, of which the last is read", fix=fix)
    if given is None:
        return 0.0
    (value, percent, _), (wanted, wanted_percent, _) = given, expected
    if _close(value, wanted):
        return 1.0
    if percent == wanted_percent:
        return 0.0
    return float(_close(value / 100, wanted) if percent else _close(value, wanted / 100))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, words counted as SQuAD does (Rajpurkar et al. 2016, 1606.05250).

    In scripts without spaces between words every letter is one, as MLQA counts Chinese (Lewis et al. 2020, 1910.07475).
    """
    given, wanted = _squad_words(answer), _squad_words(reference)
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), 0..1, without stemming.

    Words are runs of letters and digits of any script, letters with their marks; in scripts without spaces between
    words every letter is one. On ASCII text this equals rouge-score's own splitting. Texts without words (emoji,
    punctuation) score 1 where they are the same.
    """
    if not (_words(answer) or _words(reference)):
        return exact_match(answer, reference)
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU with exponential smoothing and effective order (sacrebleu; Post 2018, 1804.08771), 0..1.

    Its mean over items is not corpus BLEU: a corpus score has no value per item, hence no paired interval.
    """
    return min(1.0, _bleu().sentence_score(answer.strip(), [reference.strip()]).score / 100)


def chrf(answer: str, reference: str) -> float:
    """Character n-gram F-score, n = 1..6, beta = 2 (sacrebleu; Popović 2015), 0..1."""
    return min(1.0, _chrf().sentence_score(answer.strip(), [reference.strip()]).score / 100)


def valid_json(answer: str, reference: str = "") -> float:
    """1 where the whole answer is strict JSON. The reference does not matter."""
    try:
        parse_json(answer.strip())
    except ValueError:
        return 0.0
    return 1.0


def json_match(answer: str, reference: str) -> float:
    """1 where both are the same JSON value; key order is free. Raises DataError for a reference that is not JSON."""
    try:
        wanted = parse_json(reference.strip())
    except ValueError:
        raise DataError(
            f"the reference {_short(reference)} is not JSON", fix="Mend the row, or use exact_match."
        ) from None
    try:
        return float(same_value(parse_json(answer.strip()), wanted))
    except (ValueError, RecursionError):
        return 0.0


def call_match(answer: str, reference: str) -> float:
    """1 where the answer calls the same functions with the same arguments; nothing is executed (see calls.py).

    Raises DataError for a reference that is not a call.
    """
    wanted, given = _reference_calls(reference), parse_calls(answer)
    if given is None or len(given) != len(wanted):
        return 0.0
    try:
        return float(all(same_call(*pair) for pair in zip(given, wanted, strict=True)))
    except RecursionError:
        return 0.0


def call_name_match(answer: str, reference: str) -> float:
    """1 where the answer calls the same functions, whatever the arguments. Raises DataError as call_match does."""
    wanted, given = _reference_calls(reference), parse_calls(answer)
    return float(given is not None and [call.name for call in given] == [call.name for call in wanted])


def placeholder_f1(answer: str, reference: str) -> float:
    """F1 of the sets of `{{placeholders}}`; 1 where neither text has any."""
    given, wanted = ({" ".join(name.split()) for name in _PLACEHOLDER.findall(text)} for text in (answer, reference))
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0


def regex_match(answer: str, pattern: str, limit_seconds: float = REGEX_LIMIT_SECONDS) -> float:
    """1 where the pattern matches the whole answer.

    A pattern that backtracks without end is stopped by the regex package's own time limit and reported as RecipeError:
    scoring such a row 0 would let the machine's speed decide. The same error says where a pattern is malformed.
    """
    try:
        return float(regex.fullmatch(pattern, answer.strip(), timeout=limit_seconds) is not None)
    except regex.error as error:
        raise RecipeError(f"not a regular expression: {error}", where="task.pattern", fix="Mend the pattern.") from None
    except TimeoutError:
        what = f"{_short(pattern)} took more than {limit_seconds:g} s on the answer {_short(answer)}"
        fix = (
            "Avoid a repeat inside a repeat, such as (a+)+; write a possessive repeat (a++) or an atomic group (?>...)."
        )
        raise RecipeError(what, where="task.pattern", fix=fix) from None


def find_metric(name: str, spec: TaskSpec, root: Path) -> Grade:
    """The Grade of a metric's name, or of `file.py:function` relative to `root` (the recipe's folder).

    The function is called as function(answer: str, item: Item) and returns a finite number or a bool. A metric of
    MODEL_METRICS is known, but its Grade raises RecipeError when called: answers alone cannot be scored.
    Raises RecipeError for an unknown name (naming the nearest), a missing pattern, or a function that does not load.
    """
    match name:
        case "exact_match":
            return _grade(exact_match)
        case "normalised_match":
            return _grade(normalised_match)
        case "contains":
            return _grade(contains)
        case "numeric_match":
            return _grade(numeric_match)
        case "token_f1":
            return _grade(token_f1)
        case "rouge_l":
            return _grade(rouge_l)
        case "bleu":
            return _grade(bleu)
        case "chrf":
            return _grade(chrf)
        case "valid_json":
            return _grade(valid_json)
        case "json_match":
            return _grade(json_match)
        case "call_match":
            return _grade(call_match)
        case "call_name_match":
            return _grade(call_name_match)
        case "placeholder_f1":
            return _grade(placeholder_f1)
        case "regex":
            return _regex_grade(spec.pattern)
        case "completion_loss" | "choice_accuracy":
            return functools.partial(_needs_a_model, name)
        case _ if ".py:" in name:
            return own_grade(name, root)
    near = difflib.get_close_matches(name, [*TEXT_METRICS, *sorted(MODEL_METRICS)], n=1, cutoff=0.4)
    fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(TEXT_METRICS)}, or file.py:function."
    where = "task.also" if name in spec.also else "task.metric"
    raise RecipeError(f"unknown metric {name!r}", where=where, fix=fix)


def _grade(metric: Metric) -> Grade:
    def grade(items: Sequence[Item], answers: Sequence[str]) -> list[float]:
        return [_score(metric, item, answer) for item, answer in zip(items, answers, strict=True)]

    return grade


def _score(metric: Metric, item: Item, answer: str) -> float:
    try:
        return metric(answer, item.reference)
    except DataError as error:
        raise DataError(error.what, where=f"item {item.id}", fix=error.fix) from None


def _regex_grade(pattern: str | None) -> Grade:
    if pattern is None:
        fix = "Add task.pattern, for example pattern: '[A-Z]\\d{2}'."
        raise RecipeError("metric regex needs a pattern", where="task.pattern", fix=fix)
    regex_match("", pattern)  # a malformed pattern is an error now, not after training
    return _grade(lambda answer, reference: regex_match(answer, pattern))


def _needs_a_model(name: str, items: Sequence[Item], answers: Sequence[str]) -> list[float]:
    fix = "As a reward, use a metric of the answer's text."
    raise RecipeError(f"{name} needs the model's probabilities, not its answers", where="task.metric", fix=fix)


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "").replace("\\$", "$")
    return " ".join(_PUNCTUATION.sub(_space_for_punctuation, text).split())


def _space_for_punctuation(match: re.Match[str]) -> str:
    """Symbols (+, $, emoji) and combining marks carry meaning and stay; other punctuation becomes a space."""
    kept = match[1] is None or unicodedata.category(match[1])[0] in "MS"
    return match[0] if kept else " "


def _edge(character: str, of_word: str, of_number: str) -> str:
    """Scripts without spaces between words (category Lo) have no word boundary to ask for."""
    if not character.isalnum() or unicodedata.category(character) == "Lo":
        return ""
    return of_word + of_number if character.isdecimal() else of_word


class _Number(NamedTuple):
    """A number in a text, whether a percent sign follows, and whether it is but a part of what is written there."""

    value: Decimal
    percent: bool
    is_part: bool


def _last_number(text: str) -> _Number | None:
    text = _SIGNED_MONEY.sub(r"\1", text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$"))
    text = _DIGIT_GROUP_GAP.sub("", text)
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    is_part = _JOINED.search(text, 0, last.start()) or re.match(r"\.\d", text[last.end() :])
    return _Number(Decimal(last[0].rstrip("%").strip().replace(",", "")), last[0].endswith("%"), bool(is_part))


def _close(one: Decimal, other: Decimal) -> bool:
    if one == one.to_integral_value() and other == other.to_integral_value():
        return one == other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)


def _squad_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", _UNSPACED_LETTER.sub(r" \g<0> ", bare)).split()


def _words(text: str) -> list[str]:
    return _WORD.findall(_UNSPACED_LETTER.sub(r" \g<0> ", text.lower()))


def _reference_calls(reference: str) -> list[Call]:
    calls = parse_calls(reference)
    if calls is None:
        raise DataError(f"the reference {_short(reference)} is not a call", fix="Mend the row, or use exact_match.")
    return calls


def _short(text: str, longest_characters: int = 60) -> str:
    return repr(text if len(text) <= longest_characters else text[: longest_characters - 3] + "...")


class _Words:
    """Splits words for rouge-score, whose own splitter drops every letter outside a-z."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import (
        RougeScorer,
    )  # imports nltk: most of a second, spared to those who do not use it

    return RougeScorer(["rougeL"], tokenizer=_Words())


@functools.cache
def _bleu() -> BLEU:
    return BLEU(effective_order=True)


@functools.cache
def _chrf() -> CHRF:
    return CHRF()
