"""Who is compared: prompts chosen on validation rows, every arm asked once, lookups where they make sense."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.evaluate.metrics import find_metric
from tunesmith.evaluate.systems import Prompting, candidates, takes_system
from tunesmith.folder import RunFolder, read_json
from tunesmith.model.load import Model, load
from tunesmith.model.sample import Sampling
from tunesmith.pipeline.arms import Asking, ask, look_up, select_prompts
from tunesmith.pipeline.prepare import Prepared, prepare
from tunesmith.recipe import Recipe, TaskSpec, parse_recipe
from tunesmith.screen import Screen
from tunesmith.types import Conversation, Item, Message
from tunesmith.world import World

Make = Callable[..., dict[str, Any]]
QUIET = Screen(quiet=True)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load(str(tiny_model_folder), World())


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Make) -> Recipe:
    return parse_recipe(tiny_recipe())


@pytest.fixture(scope="module")
def data(recipe: Recipe, model: Model) -> Prepared:
    return prepare(recipe, model.vocabulary, QUIET)


def asking(*metrics: str, max_new_tokens: int = 2) -> Asking:
    grades = {name: find_metric(name, TaskSpec(), Path()) for name in metrics}
    return Asking(grades=grades, metric=metrics[0], how=Sampling(max_new_tokens=max_new_tokens))


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in pairs)  # type: ignore[arg-type]


def shot(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(messages=turns(*pairs), id="shot", source="rows:1")


def said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


FOLLOW_UP = Item(
    prompt=turns(("system", "be brief"), ("user", "one"), ("assistant", "1"), ("user", "two")), reference="2", id="i"
)


def test_instructions_join_the_rows_own_system_turn_and_shots_follow_without_theirs() -> None:
    shots = (shot(("system", "be brief"), ("user", "zero"), ("assistant", "0")),)
    sent = Prompting(name="few_shot", instructions="Count. \n", shots=shots).messages(FOLLOW_UP)
    assert said(sent) == [
        ("system", "Count.\n\nbe brief"),
        *[("user", "zero"), ("assistant", "0")],
        *[("user", "one"), ("assistant", "1"), ("user", "two")],
    ]


def test_instructions_as_user_turn_stand_once_in_each_conversation() -> None:
    shots = (shot(("user", "zero"), ("assistant", "0")),)
    sent = Prompting(name="few_shot", instructions="Count.", placement="user", shots=shots).messages(FOLLOW_UP)
    assert said(sent) == [
        ("system", "be brief"),
        *[("user", "Count.\n\nzero"), ("assistant", "0")],
        *[("user", "Count.\n\none"), ("assistant", "1"), ("user", "two")],
    ]


def test_the_tuned_model_gets_the_prompt_and_nothing_else() -> None:
    assert Prompting(name="lora").messages(FOLLOW_UP) == FOLLOW_UP.prompt


def test_no_more_shots_are_drawn_than_there_are_rows_with_a_question() -> None:
    rows = [shot(("user", str(n)), ("assistant", str(n))) for n in range(3)]
    plain = Conversation(messages=(), text="plain", id="t", source="rows:9")
    found = candidates("", 5, [*rows, plain], seed=0, allow_system=True)
    assert sorted({len(option.shots) for option in found}) == [1, 3]
    assert all(row.messages for option in found for row in option.shots)
    assert candidates("", 0, rows, seed=0, allow_system=True) == []
    assert candidates("", 5, [plain], seed=0, allow_system=True) == []


def test_a_template_says_whether_it_takes_a_system_turn(model: Model) -> None:
    assert takes_system(model.tokenizer)


def test_the_best_prompt_is_the_one_with_the_lowest_loss(
    recipe: Recipe, model: Model, data: Prepared, tmp_path: Path
) -> None:
    folder = RunFolder(path=tmp_path)
    chosen = select_prompts(recipe, model, data, asking("completion_loss"), folder, QUIET)
    tried = read_json(tmp_path / "selection.json")["tried"]
    best = min(tried, key=lambda trial: trial["valid"])
    assert chosen.best == best["arm"]
    assert {arm.name for arm in chosen.arms} == {"base", "instructed", "few_shot"}
    (tmp_path / "selection.json").write_text(
        json.dumps({"tried": [{**trial, "valid": 0.0 if trial["arm"] == "base" else 9.0} for trial in tried]})
    )
    again = select_prompts(recipe, model, data, asking("completion_loss"), folder, QUIET)
    assert again.best == "base", "what was tried before is read, not tried again"


def test_without_instructions_and_shots_the_base_stands_alone(
    tiny_recipe: Make, model: Model, data: Prepared, tmp_path: Path
) -> None:
    recipe = parse_recipe(tiny_recipe({"task.instructions": "", "task.shots": 0}))
    chosen = select_prompts(recipe, model, data, asking("exact_match"), RunFolder(path=tmp_path), QUIET)
    assert ([arm.name for arm in chosen.arms], chosen.best, chosen.shots) == (["base"], "base", 0)


def test_prompts_longer_than_the_context_are_left_out_and_told(
    tiny_recipe: Make, model: Model, data: Prepared, tmp_path: Path
) -> None:
    recipe = parse_recipe(tiny_recipe({"task.instructions": "x" * 600}))
    told = io.StringIO()
    screen = Screen(console=Console(file=told, width=200))
    chosen = select_prompts(recipe, model, data, asking("exact_match"), RunFolder(path=tmp_path), screen)
    assert [arm.name for arm in chosen.arms] == ["base"]
    assert "longer than the model's context" in told.getvalue()


def test_a_row_that_leaves_prompts_no_room_is_told(
    tiny_recipe: Make, model: Model, data: Prepared, tmp_path: Path
) -> None:
    recipe = parse_recipe(tiny_recipe({"task.instructions": "Give the upper case."}))
    # Fewer characters than the other long one, and three tokens each.
    rare = Item(prompt=turns(("user", "\u20ac" * 160)), reference="", id="rare")
    told = io.StringIO()
    screen = Screen(console=Console(file=told, width=400))
    odd = replace(data, test_items=(rare, Item(prompt=turns(("user", "a" * 170)), reference="", id="long")))
    chosen = select_prompts(recipe, model, odd, asking("exact_match"), RunFolder(path=tmp_path), screen)
    assert "few_shot" not in {arm.name for arm in chosen.arms}
    said = f"few_shot: 2 shots left out, as 1 of {len(data.valid_items) + 2} held-out rows would be longer"
    assert said in told.getvalue()
    assert "the longest of these: '\u20ac\u20ac" in told.getvalue()
    assert any(said in reason for reason in chosen.untried)


def test_an_arm_is_asked_once_and_again_when_the_rows_are_others(model: Model, data: Prepared, tmp_path: Path) -> None:
    folder, base = RunFolder(path=tmp_path), Prompting(name="base")
    how = asking("exact_match", "completion_loss")
    first = ask("base", model, base, data.test_items, how, folder, QUIET)
    lines = folder.answers("base").read_text().replace('"exact_match": 0.0', '"exact_match": 0.5')
    folder.answers("base").write_text(lines)
    second = ask("base", model, base, data.test_items, how, folder, QUIET)
    assert set(second.scores["exact_match"]) == {0.5}
    assert second.answers == first.answers
    assert second.scores["completion_loss"].tolist() == first.scores["completion_loss"].tolist()
    third = ask("base", model, base, data.test_items[:3], how, folder, QUIET)
    assert third.ids == tuple(item.id for item in data.test_items[:3])
    assert set(third.scores["exact_match"]) == {0.0}


def test_nothing_is_generated_where_no_metric_reads_answers(model: Model, data: Prepared, tmp_path: Path) -> None:
    found = ask(
        "b", model, Prompting(name="b"), data.test_items, asking("completion_loss"), RunFolder(path=tmp_path), QUIET
    )
    assert set(found.answers) == {""}
    assert not found.completion_tokens.any()
    assert found.prompt_tokens.all()


def test_lookups_answer_where_answers_are_graded(data: Prepared, tmp_path: Path) -> None:
    folder = RunFolder(path=tmp_path)
    assert set(look_up(data.rows, data.test_items, asking("exact_match"), folder)) == {"nearest_neighbour", "majority"}
    assert look_up(data.rows, data.test_items, asking("completion_loss"), folder) == {}
    plain = (Conversation(messages=(), text="plain", id="t", source="rows:9"),)
    assert look_up(plain, data.test_items, asking("exact_match"), folder) == {}
