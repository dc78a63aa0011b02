"""Built-in tasks: real tables, distinct rows, the same for a seed; and recipes that ask for them are valid."""

from __future__ import annotations

import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tunesmith.data.tasks import TASKS, botocore_calls, builtin, first_sentence, icd10cm_chapters, legal_citations
from tunesmith.errors import RecipeError
from tunesmith.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
DRAWN = TASKS[:3]
NAMES = ("legal_citations", "icd10cm_chapters", "botocore_calls", "customer_support")


@pytest.mark.parametrize("name", DRAWN)
def test_rows_are_distinct_and_the_same_for_a_seed(name: str) -> None:
    rows = list(builtin(name, 400, 0))
    assert rows == list(builtin(name, 400, 0))
    assert [row.source for row in rows[:2]] == [f"builtin:{name}:1", f"builtin:{name}:2"]
    assert len(rows) == len({row.prompt[0].content for row in rows}) == len({row.id for row in rows}) == 400
    assert {row.id for row in rows} != {row.id for row in builtin(name, 400, 1)}
    assert all(row.prompt[0].content.strip() and row.completion.strip() for row in rows)


def test_a_citation_is_made_of_the_parts_it_was_drawn_from() -> None:
    rows = list(legal_citations(500, 0))
    form = re.compile(r"(.+) v\. (.+), (\d+) (.+) (\d+) \((?:(.+) )?(\d{4})\)\.")
    for row in rows:
        match = form.fullmatch(row.completion)
        assert match is not None
        extra = row.extra
        assert list(match.group(1, 2)) == list(extra["parties"])  # type: ignore[call-overload]
        assert match.group(3, 4, 5) == (str(extra["volume"]), extra["reporter"], str(extra["page"]))
        assert (match.group(6) or "") == extra["court"]
        asked = row.prompt[0].content
        assert all(str(extra[part]) in asked for part in ("volume", "spelling", "page", "year"))


def test_citations_cover_reporters_courts_and_kinds_of_mess() -> None:
    rows = list(legal_citations(1500, 0))
    asked = "".join(row.prompt[0].content for row in rows)
    assert all(mess in asked for mess in (" | ", "; ", "\n", "vol. ", " volume ", " versus ", " against ", " V. "))
    assert len({row.extra["reporter"] for row in rows}) > 25
    assert len({row.extra["court"] for row in rows}) > 150
    assert any("United States v. " in row.completion for row in rows)
    assert not re.search(r"[^\w\s.,;|()\[\]'-]", asked)


def test_a_court_sat_in_the_year_of_its_case() -> None:
    for row in legal_citations(800, 1):
        year = row.extra["year"]
        assert isinstance(year, int)
        assert 1790 <= year <= 2024
        if row.extra["court"] == "11th Cir.":
            assert year > 1981


def test_diagnoses_have_one_of_22_chapters_each() -> None:
    rows = list(icd10cm_chapters(6000, 0))
    titles = Counter(row.completion for row in rows)
    assert len(titles) == 22
    assert max(titles.values()) < 0.2 * len(rows)
    assert not any(re.search(r"\([A-Z]\d", title) for title in titles)


def test_aws_calls_are_named_as_boto3_names_them() -> None:
    rows = list(botocore_calls(1500, 0))
    assert all(re.fullmatch(r"[a-z0-9-]+\.[a-z0-9_]+", row.completion) for row in rows)
    assert any(row.completion == "s3.create_bucket" for row in builtin("botocore_calls", 5000, 0))
    assert not any(re.search(r"<\w+>|&\w+;|\s\s", row.prompt[0].content) for row in rows)


@pytest.mark.parametrize(
    ("documentation", "sentence"),
    [
        ("<p>Creates a <b>bucket</b> in S3. It is empty.</p><p>More.</p>", "Creates a bucket in S3."),
        ("<p></p> <p>Lists  keys &amp; values</p>", "Lists keys & values"),
        ("<p>Stops it.</p>", ""),
        ("Uses v1.2 of the API.", "Uses v1.2 of the API."),
        ("", ""),
    ],
)
def test_the_first_sentence_is_plain_text(documentation: str, sentence: str) -> None:
    assert first_sentence(documentation) == sentence


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="builtin:legal_citations") as caught:
        builtin("legal_citation", 1, 0)
    assert all(name in caught.value.fix for name in TASKS)


@pytest.mark.parametrize(
    ("name", "package"), list(zip(DRAWN, ("courts_db", "simple_icd_10_cm", "botocore"), strict=True))
)
def test_a_missing_package_says_what_to_install(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=r"pip install tunesmith\[demo\]"):
        list(builtin(name, 1, 0))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_says_how_it_is_run(name: str) -> None:
    path = next(path for path in RECIPES if path.stem == name)
    recipe = load_recipe(path)
    head = path.read_text(encoding="utf-8").split("base:")[0]
    assert all(key in head for key in ("# command:", "# machine:", "# measured result:"))
    assert recipe.task.instructions


def test_the_icd_recipe_tells_the_base_model_every_title() -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "icd10cm_chapters"))
    told = recipe.task.instructions.splitlines()[1:]
    assert sorted(told) == sorted({row.completion for row in icd10cm_chapters(8000, 0)})


def test_surnames_are_sorted_and_distinct() -> None:
    from tunesmith.data.surnames import SURNAMES

    assert all(a < b for a, b in pairwise(sorted(SURNAMES)))
    assert len(SURNAMES) >= 300
