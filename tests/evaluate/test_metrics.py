"""Metrics score what they claim to, on awkward text too, and the user's own function fails in one clear sentence."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate import metrics
from tunesmith.evaluate.metrics import find_metric
from tunesmith.recipe import TaskSpec
from tunesmith.types import Item, Message

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def item(reference: str, name: str = "row7") -> Item:
    return Item(prompt=(Message(role="user", content="?"),), reference=reference, id=name)


def grade(name: str, answer: str, reference: str, spec: TaskSpec | None = None, root: Path = Path()) -> float:
    return find_metric(name, spec or TaskSpec(), root)([item(reference)], [answer])[0]


SAMPLE = {"numeric_match": "It is 12.", "json_match": '{"a": [1]}', "valid_json": "[1]", "call_match": "f(x=1)",
          "call_name_match": "f(x=1)", "placeholder_f1": "Dear {{name}}"}  # fmt: skip


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
def test_every_metric_gives_the_reference_itself_full_marks_and_an_empty_answer_none(name: str) -> None:
    reference = SAMPLE.get(name, "The cat sat on the mat today.")
    spec = TaskSpec(pattern=r"The .*\.")
    assert grade(name, reference, reference, spec) == pytest.approx(1.0)
    assert grade(name, "", reference, spec) == 0.0


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
@given(answer=st.text(max_size=40))
def test_any_answer_scores_between_0_and_1(name: str, answer: str) -> None:
    score = grade(name, answer, SAMPLE.get(name, "The cat sat on the mat."), TaskSpec(pattern="a+"))
    assert 0.0 <= score <= 1.0
    assert score in {0.0, 1.0} or not metrics.is_binary(name)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The  Cat.", "the cat", True),
        ("card_arrival", "Card arrival", True),
        ("Don't", "dont", True),
        ("3.14", "314", False),
        ("-5", "5", False),
        ("-$5", "$5", False),
        ("-US$5", "US$5", False),
        ("-\\$5", "-$5", True),
        ("$3-$5", "$3 $5", True),
        ("C++", "C", False),
        ("C#", "c", True),
        ("ＣＡＦＥ", "cafe", True),
        ("कि", "क", False),
        ("!!!", "???", False),
        ("?", " ? ", True),
    ],
)
def test_normalised_match_folds_form_but_not_meaning(answer: str, reference: str, same: bool) -> None:
    assert metrics.normalised_match(answer, reference) == float(same)


@pytest.mark.parametrize(
    ("answer", "reference", "found"),
    [
        ("I know", "no", False),
        ("No, thanks", "no", True),
        ("costs $5.", "$5", True),
        ("costs $50", "$5", False),
        ("The answer is 1.5", "5", False),
        ("The answer is 1.5", "1", False),
        ("15,000", "15", False),
        ("15,000", "000", False),
        ("version 1.5.2", "1.5", False),
        ("The answer is 5.", "5", True),
        ("5, and no more", "5", True),
        ("The answer is 1.5.", "1.5", True),
        ("one of [4, 5]", "5", True),
        ("答案是北京。", "北京", True),
        ("new\n york city", "New York", True),
        ("anything", "", False),
    ],
)
def test_contains_respects_words_and_numbers(answer: str, reference: str, found: bool) -> None:
    assert metrics.contains(answer, reference) == float(found)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("3 apples and 4 pears make 7.", "7", True),
        ("$1,234.50 in all", "1234.5", True),
        ("1\u202f234", "1234", True),
        ("\N{MINUS SIGN}5 degrees", "-5", True),
        ("5-3", "3", True),
        ("The balance is $3", "-$3", False),
        ("-$3", "-3", True),
        ("\N{MINUS SIGN}€1,234.50", "-1234.5", True),
        ("-US$ .5", "-0.5", True),
        ("**-\\$3**", "-3", True),
        ("$-3", "-3", True),
        ("- $3", "3", True),
        ("A-$3", "3", True),
        ("$3-$5", "5", True),
        ("3€-€5", "5", True),
        ("$3$-$5$", "5", True),
        ("12 %", "0.12", True),
        ("12", "12%", True),
        ("0.12", "12%", True),
        ("12%", "0.12%", False),
        ("12345678901234567891", "12345678901234567890", False),
        ("0.3333333", "0.33333333", True),
        (".5", "0.5", True),
        ("1e3", "1000", True),
        ("[1,2]", "2", True),
        ("no idea", "7", False),
        ("H2O", "2", False),
        ("1e9999", "7", False),
    ],
)
def test_numeric_match_reads_the_last_number(answer: str, reference: str, same: bool) -> None:
    assert metrics.numeric_match(answer, reference) == float(same)


@pytest.mark.parametrize(
    "reference", ["3,5", "1/2", "2024-05-01", "10:30", "1.234,56", "1.234.567", "[1,2]", r"\frac{1}{2}"]
)
def test_a_reference_of_which_numeric_match_would_read_a_part_is_refused(reference: str) -> None:
    with pytest.raises(DataError, match="joins several numbers"):
        metrics.numeric_match("5", reference)
    assert metrics.numeric_match("5", f"{reference} and so 5.") == 1.0


@given(st.integers(-(10**12), 10**12))
def test_numeric_match_accepts_any_integer_with_thousands_separators(number: int) -> None:
    assert metrics.numeric_match(f"The total is {number:,}.", str(number)) == 1.0
    assert metrics.numeric_match(str(number + 1), str(number)) == 0.0


def test_token_f1_counts_words_as_squad_does() -> None:
    assert metrics.token_f1("the cat sat", "A cat, sat down!") == pytest.approx(2 * 2 / (2 + 3))
    assert metrics.token_f1("the", "a") == 1.0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # common subsequence "police the gunman" is 2 words long once order counts: precision 2/4, recall 2/4
    assert metrics.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert metrics.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)


ASCII_TEXT = st.text(st.sampled_from("aaabBC19  _-'.\n"), max_size=40)


@given(ASCII_TEXT, ASCII_TEXT)
def test_rouge_l_equals_rouge_score_where_an_ascii_text_has_words(answer: str, reference: str) -> None:
    assume(any(character.isalnum() for character in answer + reference))
    assert metrics.rouge_l(answer, reference) == RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure


def test_rouge_l_counts_words_of_any_script() -> None:
    assert metrics.rouge_l("привет мир", "привет мир") == 1.0


@pytest.mark.parametrize("score", [metrics.rouge_l, metrics.token_f1])
def test_a_letter_is_a_word_in_a_script_without_spaces(score: Callable[[str, str], float]) -> None:
    assert score("我喜欢北京的天气", "我喜欢南京的天气") == 7 / 8
    assert score("我用Python 3", "我用 Python 3") == 1.0
    assert score("東京タワー", "東京ドーム") == 3 / 5
    for one, other in [("ที่ไหน", "ที่ใหน"), ("ລາວນີ້", "ລາວນັ້ນ"), ("ខ្មែរ", "ខ្មោច"), ("မြန်မာ", "မြန်မြန်")]:
        assert 0.0 < score(one, other) < 1.0


@pytest.mark.parametrize("score", [metrics.rouge_l, metrics.token_f1])
def test_a_letter_keeps_its_marks(score: Callable[[str, str], float]) -> None:
    assert score("की", "कि") == 0.0
    assert score("ที่", "ที") == 0.0
    assert score("हिन्दी में लिखो", "हिन्दी में पढ़ो") == pytest.approx(2 / 3)


def test_rouge_l_of_texts_without_words_asks_whether_they_are_the_same() -> None:
    assert metrics.rouge_l("🎉 ", "🎉") == 1.0
    assert metrics.rouge_l("😀", "🎉") == 0.0
    assert metrics.rouge_l("🎉 hello", "🎉") == 0.0


def test_json_must_be_strict() -> None:
    assert [metrics.valid_json(text) for text in ('{"a": 1}', "{a: 1}", "NaN", "```json\n{}\n```", "[" * 100_000)] == [
        1.0, 0.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip


def test_json_match_frees_key_order_but_tells_true_from_1() -> None:
    assert metrics.json_match('{"b": 1.0, "a": [2]}', '{"a": [2], "b": 1}') == 1.0
    assert metrics.json_match('{"a": true}', '{"a": 1}') == 0.0
    assert metrics.json_match("[2, 1]", "[1, 2]") == 0.0


@given(JSON_VALUES)
def test_json_match_holds_for_any_value_however_it_is_spelt(value: object) -> None:
    assert metrics.json_match(json.dumps(value, indent=3, ensure_ascii=False), json.dumps(value, sort_keys=True)) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("client('s3').create_bucket(Bucket=...)", 'client("s3").create_bucket(Bucket=...)', True),
        ('client("sqs").create_bucket(Bucket=...)', 'client("s3").create_bucket(Bucket=...)', False),
        ('f(y="a", x=1)', 'f(x=1, y="a")', True),
        ('f(1, "a")', 'f(x=1, y="a")', True),
        ('f(1, y="a")', 'f(x=1, y="a")', True),
        ('f("a", 1)', 'f(x=1, y="a")', False),
        ("f(1, x=1)", "f(x=1, y=1)", False),
        ("f(1, 2)", "f(2, 1)", False),
        ("f(x=True)", "f(x=1)", False),
        ("f(x=1.0)", "f(x=1)", True),
        ("f(x=(1, -2))", "f(x=[1, -2])", True),
        ("f(x=a + 1)", "f(x=a+1)", True),
        ("f(x='a')", "f(x=a)", False),
        ("f(**{'x': 1})", "f(x=1)", True),
        ('{"name": "f", "arguments": {"y": "a", "x": 1}}', 'f(x=1, y="a")', True),
        ('[{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]', "f(x=1)", True),
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "f(x=1)", True),
        ("```python\nf(x=1)\n```", "f(x=1)", True),
        ("[f(x=1), g()]", "[f(x=1), g()]", True),
        ("[f(x=1)]", "[f(x=1), g()]", False),
        ("f(x=1) and more", "f(x=1)", False),
        ("f(x=1", "f(x=1)", False),
        ("f", "f()", False),
    ],
)
def test_call_match_compares_name_and_arguments(answer: str, reference: str, same: bool) -> None:
    assert metrics.call_match(answer, reference) == float(same)
    assert metrics.call_match(reference, reference) == 1.0


@pytest.mark.parametrize(
    ("around", "between"),
    [("{}", "\n"), ("{}", ""), ("```\n{}\n```", "\n\n"), ("\n{}\n", " ")],
)
def test_several_tool_call_blocks_are_several_calls_in_their_order(around: str, between: str) -> None:
    blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in ('{"name": "f", "arguments": {"x": 1}}', "g()")]
    text = around.format(between.join(blocks))
    for score in (metrics.call_match, metrics.call_name_match):
        assert score(text, "[f(x=1), g()]") == score("[f(x=1), g()]", text) == score(text, text) == 1.0
        assert score(between.join(reversed(blocks)), text) == score(blocks[0], text) == 0.0
    assert metrics.call_match(text, "[f(x=2), g()]") == 0.0


@pytest.mark.parametrize("between", [" and ", "<tool_call></tool_call>", "<tool_call>not so</tool_call>"])
def test_a_tool_call_block_beside_anything_else_is_no_call(between: str) -> None:
    assert metrics.call_match(f"<tool_call>f()</tool_call>{between}<tool_call>f()</tool_call>", "[f(), f()]") == 0.0


def test_call_name_match_ignores_arguments() -> None:
    assert metrics.call_name_match('client("s3").list(A=1)', 'client("s3").list(B=2)') == 1.0
    assert metrics.call_name_match('client("s3").list()', 'client("ec2").list()') == 0.0


@pytest.mark.parametrize(
    "answer",
    ["(" * 10_000, "-" * 10_000 + "1", "f(" + "[" * 5_000, "a" + ".b" * 9_000, "1+" * 9_000 + "1", "f(\0)", "f(\ud800)",
     "[" * 900 + "]" * 900, "f(x=" + "{1:" * 150 + "1" + "}" * 150 + ")", '"\\d"("x")', "x" * 1_000_000],
)  # fmt: skip
def test_hostile_answers_are_no_call_and_no_crash(answer: str) -> None:
    assert metrics.call_match(answer, "f(x=1)") == 0.0
    assert metrics.json_match(answer, "1") == 0.0


def test_a_call_is_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    metrics.call_match(f"__import__('pathlib').Path({str(target)!r}).touch()", "f()")
    assert not target.exists()


def test_placeholder_f1_compares_sets() -> None:
    assert metrics.placeholder_f1("{{ Order Number }} {{Order Number}} {{Name}}", "{{Order  Number}}") == 2 / 3
    assert metrics.placeholder_f1("none", "none") == 1.0


@pytest.mark.parametrize("name", ["numeric_match", "json_match", "call_match", "call_name_match"])
def test_a_reference_that_the_metric_cannot_read_is_an_error_naming_the_item(name: str) -> None:
    with pytest.raises(DataError, match="item row7: the reference 'not so' "):
        grade(name, "1", "not so")


def test_regex_must_match_the_whole_answer() -> None:
    spec = TaskSpec(pattern=r"[A-Z]\d{2}")
    assert [grade("regex", answer, "", spec) for answer in ("A12", " A12\n", "A123", "xA12")] == [1.0, 1.0, 0.0, 0.0]


def test_regex_without_or_with_a_malformed_pattern_names_the_key() -> None:
    with pytest.raises(RecipeError, match="task.pattern: metric regex needs a pattern"):
        find_metric("regex", TaskSpec(), Path())
    with pytest.raises(RecipeError, match="task.pattern: not a regular expression"):
        find_metric("regex", TaskSpec(pattern="("), Path())


def test_a_pattern_that_backtracks_without_end_is_stopped_and_named() -> None:
    with pytest.raises(RecipeError, match=r"'\(a\|aa\)\+\$' took more than 0.05 s"):
        metrics.regex_match("a" * 80 + "!", "(a|aa)+$", limit_seconds=0.05)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="task.metric: unknown metric 'exact_mach'\nDid you mean 'exact_match'"):
        find_metric("exact_mach", TaskSpec(), Path())


@pytest.mark.parametrize("name", sorted(metrics.MODEL_METRICS))
def test_a_metric_of_the_model_is_known_but_cannot_grade_text(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} needs the model's probabilities"):
        find_metric(name, TaskSpec(), Path())([], [])


def test_only_losses_and_distances_are_better_when_lower() -> None:
    assert not metrics.higher_is_better("completion_loss")
    assert all(metrics.higher_is_better(name) for name in (*metrics.TEXT_METRICS, "choice_accuracy", "own.py:score"))


def own(folder: Path, body: str, name: str = "own.py:score") -> float:
    (folder / "own.py").write_text(textwrap.dedent(body), encoding="utf-8")
    return grade(name, "an answer", "a reference", root=folder)


def test_the_users_own_function_gets_answer_and_item(tmp_path: Path) -> None:
    body = """
        from dataclasses import dataclass

        @dataclass
        class Grade:
            value: int

        def score(answer, item):
            return Grade(len(answer) + len(item.reference)).value
        """
    assert own(tmp_path, body) == 9 + 11
    assert own(tmp_path, "def score(answer, item): return True") == 1.0
    assert own(tmp_path, "import numpy\ndef score(answer, item): return numpy.bool_(True)") == 1.0
    assert own(tmp_path, "import numpy\ndef score(answer, item): return numpy.float32(0.5)") == 0.5


def test_a_second_parameter_that_could_be_either_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="own.py:score: the second parameter is called 'gold'.*\n.*reference.*item"):
        own(tmp_path, "def score(answer, gold): return answer == gold")
    assert own(tmp_path, "def score(answer, _): return 1") == own(tmp_path, "def score(*both): return 1") == 1.0


@pytest.mark.parametrize("result", ["None", "'0.5'", "float('nan')", "float('inf')", "[1.0]", "1j"])
def test_an_own_function_must_return_a_finite_number(tmp_path: Path, result: str) -> None:
    with pytest.raises(RecipeError, match="own.py:score, item row7: the function returned"):
        own(tmp_path, f"def score(answer, item): return {result}")


def test_what_an_own_function_raises_is_told_with_line_and_item(tmp_path: Path) -> None:
    body = "def inner(x):\n    return x['a']\ndef score(answer, item):\n    return inner({})"
    with pytest.raises(RecipeError, match=r"own.py:score, item row7: the function fails: KeyError: 'a' \(line 2\)"):
        own(tmp_path, body)


def test_an_own_file_that_is_absent_or_broken_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="absent.py:score: no such file"):
        find_metric("absent.py:score", TaskSpec(), tmp_path)
    with pytest.raises(RecipeError, match="own.py:score: the file fails to load: ZeroDivisionError: .* \\(line 2\\)"):
        own(tmp_path, "x = 1\ny = x / 0")
    with pytest.raises(RecipeError, match="the file fails to load: SyntaxError"):
        own(tmp_path, "def score(:")
    with pytest.raises(RecipeError, match="no function 'scor' in the file\nDid you mean 'score'"):
        own(tmp_path, "def score(answer, item): return 1", name="own.py:scor")
