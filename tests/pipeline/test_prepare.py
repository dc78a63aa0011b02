"""Rows become examples and questions: what is asked, how long an answer may be, and what a metric cannot grade."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tunesmith.data.read import read
from tunesmith.data.render import render
from tunesmith.data.store import Lazy
from tunesmith.errors import DataError, RecipeError
from tunesmith.model.load import Vocabulary, load_vocabulary
from tunesmith.pipeline.forecast import what_rows_show
from tunesmith.pipeline.prepare import Prepared, fingerprints, prepare, questions
from tunesmith.pipeline.rows import conversations
from tunesmith.recipe import DataSpec, TaskSpec, parse_recipe
from tunesmith.screen import Screen
from tunesmith.types import Conversation

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def vocabulary(tiny_model_folder: Path) -> Vocabulary:
    return load_vocabulary(str(tiny_model_folder))


def prepared(raw: dict[str, Any], vocabulary: Vocabulary) -> Prepared:
    return prepare(parse_recipe(raw), vocabulary, Screen(quiet=True))


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"{n} {chr(97 + n % 26) * 9} stands alone"} for n in range(count)]


def rows_of(path: str) -> Sequence[Conversation]:
    return conversations(tuple(read(path, DataSpec(train=path))))


def test_counts_are_of_the_rows_that_are_used(tiny_recipe: Make, vocabulary: Vocabulary) -> None:
    found = prepared(tiny_recipe({"evaluate.rows": 7, "evaluate.valid_rows": 5}), vocabulary)
    assert len(found.test_items) == 7
    assert len(found.valid_items) == len(found.valid) == 5
    sizes = found.counts["data"]
    assert (sizes["train"], sizes["valid"], sizes["test"]) == (len(found.rows), 5, 7)
    assert sizes["dropped"] == 0


def test_an_answer_may_be_a_quarter_longer_than_the_longest_one_trained(
    tiny_recipe: Make, vocabulary: Vocabulary
) -> None:
    raw = tiny_recipe()
    del raw["task"]["max_new_tokens"]
    # Three letters and the end of turn: 4 tokens, and a quarter more, as a multiple of 8.
    assert prepared(raw, vocabulary).max_new_tokens == 8


@pytest.mark.parametrize("most", [None, 16])
def test_one_answer_that_is_far_longer_than_the_others_is_told(
    tiny_recipe: Make, tmp_path: Path, vocabulary: Vocabulary, most: int | None
) -> None:
    rows = [{"prompt": f"q{n} {chr(97 + n % 26) * 3}", "completion": "yes"} for n in range(60)]
    parts = {"valid": rows[:10], "test": rows[10:20], "train": [*rows[20:], {"prompt": "z", "completion": "1" * 200}]}
    data = {f"data.{name}": written(tmp_path / f"{name}.jsonl", *part) for name, part in parts.items()}
    told = io.StringIO()
    changes = {**data, "data.near_duplicates": 1.0, "task.max_new_tokens": most}
    prepare(parse_recipe(tiny_recipe(changes)), vocabulary, Screen(console=Console(file=told, width=300)))
    said = "the longest answer has 201 tokens, 95% of the answers up to 4: every arm may write 256 tokens"
    assert (said in told.getvalue()) == (most is None)


def test_room_for_an_answer_counts_what_the_template_writes_of_a_tool_call(
    tiny_recipe: Make, tmp_path: Path, tiny_model_folder: Path, vocabulary: Vocabulary
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m.tool_calls %}"
    template += "{{ c['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    vocabulary.tokenizer.chat_template, before = template, vocabulary.tokenizer.chat_template
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"weather in place {n} {chr(97 + n) * 7}"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "w" * 60, "n": n}}]},
            ]
        }
        for n in range(26)
    ]
    raw = tiny_recipe({"data.train": written(tmp_path / "rows.jsonl", *rows)})
    del raw["task"]["max_new_tokens"]
    try:
        found = prepared(raw, vocabulary)
    finally:
        vocabulary.tokenizer.chat_template = before
    assert found.max_new_tokens > 60
    assert json.loads(found.test_items[0].reference)[0]["function"]["name"] == "w" * 60


def test_plain_text_is_trained_throughout_and_judged_by_its_loss(
    tiny_recipe: Make, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    raw = tiny_recipe({"data.train": written(tmp_path / "rows.jsonl", *texts(60)), "task.also": []})
    found = prepared({**raw, "task": {"metric": "completion_loss"}}, vocabulary)
    assert {item.prompt for item in found.test_items} == {()}
    assert all(example.weights[0] == 0 and example.weights[1:].all() for example in found.train)
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: plain text asks nothing, so chrf has no answer to grade"):
        prepared({**raw, "task": {"metric": "completion_loss", "also": ["chrf"]}}, vocabulary)


def test_preference_pairs_are_not_imitated(tiny_recipe: Make, tmp_path: Path, vocabulary: Vocabulary) -> None:
    rows = [{"prompt": f"{n} {chr(97 + n) * 9}", "chosen": "a", "rejected": "b"} for n in range(26)]
    with pytest.raises(RecipeError, match="preference pairs"):
        prepared(tiny_recipe({"data.train": written(tmp_path / "rows.jsonl", *rows)}), vocabulary)


def test_choices_come_from_the_task(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "rows.jsonl", {"prompt": "sky?", "completion": "blue"}))
    task = TaskSpec(metric="choice_accuracy", choices=["blue", "red"])
    assert questions(rows, task)[0].choices == ("blue", "red")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the answer 'blue' is none of task.choices"):
        questions(rows, TaskSpec(also=["choice_accuracy"], choices=["Blue", "Red"]))


@pytest.mark.parametrize("name", ["numeric_match", "json_match", "call_match", "call_name_match"])
def test_a_reference_that_a_metric_cannot_read_names_its_row_before_anything_is_asked(
    tmp_path: Path, name: str
) -> None:
    good = {"prompt": "sky?", "completion": "f(1)" if name.startswith("call") else "1"}
    rows = rows_of(written(tmp_path / "rows.jsonl", good, {"prompt": "sea?", "completion": "not known"}))
    with pytest.raises(DataError, match=r"rows.jsonl:2: the reference 'not known' "):
        questions(rows, TaskSpec(also=[name]))


def test_the_likelihood_of_calls_alone_is_not_measured_as_that_of_their_json(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]}]
    rows = rows_of(written(tmp_path / "rows.jsonl", {"messages": turns}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: completion_loss is of text, and the answer only calls tools"):
        questions(rows, TaskSpec(also=["completion_loss"]))


def test_fingerprints_change_with_the_files_and_leave_out_what_is_no_file(tiny_recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    recipe = parse_recipe(tiny_recipe({"data.train": written(path, *texts(3))}))
    before = fingerprints(recipe, tmp_path)
    assert set(before) == {"data.train"}
    written(path, *texts(4))
    assert fingerprints(recipe, tmp_path) != before
    path.unlink()
    assert fingerprints(recipe, tmp_path) == {}


def test_fingerprints_know_the_users_own_metrics_and_reward(tiny_recipe: Make, tmp_path: Path) -> None:
    own = {"task.metric": "own.py:f", "task.also": ["token_f1", "own/more.py:g"], "reward": {"by": "pay.py:h"}}
    recipe = parse_recipe(tiny_recipe({**own, "method": "grpo"}))
    (tmp_path / "own").mkdir()
    for name in ("own.py", "own/more.py", "pay.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    before = fingerprints(recipe, tmp_path)
    assert set(before) == {"data.train", "task.metric", "task.also[1]", "reward.by"}
    (tmp_path / "pay.py").write_text("# other\n")
    after = fingerprints(recipe, tmp_path)
    assert {key for key in after if after[key] != before[key]} == {"reward.by"}


def test_what_rows_show_is_known_beforehand_for_right_or_wrong_only(tiny_recipe: Make) -> None:
    smallest, told = what_rows_show(parse_recipe(tiny_recipe()), 100)
    assert smallest is not None
    assert 0 < smallest < 1
    assert f"100 test rows can show a difference of {100 * smallest:.1f} points" in told
    assert what_rows_show(parse_recipe(tiny_recipe({"task.metric": "completion_loss"})), 100)[0] is None
    assert "(level 97.5%," in what_rows_show(parse_recipe(tiny_recipe({"evaluate.level": 0.975})), 100)[1]


def test_too_few_test_rows_are_said_to_carry_no_verdict(tiny_recipe: Make) -> None:
    assert what_rows_show(parse_recipe(tiny_recipe()), 9)[1].startswith("9 test rows carry no verdict")


def test_each_row_that_is_not_too_long_has_its_own_example(
    tiny_recipe: Make, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    rows = [{"prompt": f"{n} {chr(97 + n % 26) * (n % 40)}", "completion": "yes"} for n in range(80)]
    changes: dict[str, Any] = {"data.train": written(tmp_path / "rows.jsonl", *rows), "data.overlong": "drop"}
    middle = prepared(tiny_recipe(changes), vocabulary).counts["data"]["tokens_per_row"]["p50"]
    found = prepared(tiny_recipe({**changes, "data.max_tokens": int(middle)}), vocabulary)
    assert found.census.splits["train"].dropped["too many tokens"] >= 10
    for row, example in zip(found.rows, found.train, strict=True):
        (wanted,) = render(row, vocabulary.tokenizer, vocabulary.eos_ids)
        assert example.id == wanted.id == row.id
        assert np.array_equal(example.tokens, wanted.tokens)
        assert np.array_equal(example.weights, wanted.weights)


def test_all_that_grows_with_the_file_is_on_disk(tiny_recipe: Make, vocabulary: Vocabulary) -> None:
    found = prepared(tiny_recipe(), vocabulary)
    for part in (found.rows, found.train, found.valid, found.test_items, found.ledger):
        assert isinstance(part, Lazy)


def test_prompts_alone_are_nothing_to_imitate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has a prompt and no answer to imitate"):
        rows_of(written(tmp_path / "a.jsonl", {"prompt": "q"}))
