"""The label page in a real browser, with a server that is killed and a tab that is closed on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.serve.choices import opened, read_choices, read_pairs

pytestmark = pytest.mark.slow

KEYS = ["ArrowLeft", "2", "t", "b", "s", "d", "1", "ArrowRight", "a"]
PICKS = {
    **dict.fromkeys(("ArrowLeft", "1", "a"), "left"),
    **dict.fromkeys(("ArrowRight", "2", "d"), "right"),
    "t": "tie",
    "b": "both_bad",
    "s": "skip",
}
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\n\n  two lines"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A recipe and 12 pairs of two models, one of them hostile, as the command's arguments."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"data": {"train": "none.jsonl"}}))
    rows = [
        {
            "prompt": f"Question {n}?",
            "answer_a": f"Alpha {n}",
            "answer_b": f"Beta {n}",
            "model_a": "M1",
            "model_b": "M2",
        }
        for n in range(11)
    ]
    rows.append({**rows[0], "prompt": HOSTILE, "answer_a": HOSTILE})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["job.yaml", "--pairs", "pairs.jsonl", "--out", "labels", "--repeats", "0.2"]


def sign_in(browser: Any, name: str) -> None:
    browser.until("document.body.dataset.view === 'ask'")
    browser.run("document.getElementById('rater').focus()")
    browser.call("Input.insertText", text=name)
    browser.click("#form button")
    browser.until("document.body.dataset.view === 'judge'")


def seen(browser: Any) -> dict[str, str]:
    """What stands on the screen, as a person reads it."""
    texts = (
        "left: document.querySelector('#left .text').innerText, right: document.querySelector('#right .text').innerText"
    )
    return browser.run(f"({{ pair: document.body.dataset.pair, done: document.body.dataset.done, {texts} }})")


def strike(browser: Any, key: str) -> dict[str, str]:
    """Choose, wait for the next pair, and return what was chosen from."""
    before = seen(browser)
    browser.press(key)
    browser.until(f"document.body.dataset.pair !== '{before['pair']}'")
    return {**before, "pick": PICKS[key]}


def recorded(folder: Path) -> list[dict[str, str]]:
    """Standing choices, with the texts that stood left and right."""
    with opened(folder) as store:
        pairs, choices = read_pairs(store), read_choices(store)
    rows = []
    for choice in choices:
        pair = pairs[choice.pair]
        sides = (pair.a, pair.b) if choice.left == "a" else (pair.b, pair.a)
        name = choice.pair + ("+" if choice.repeat else "")
        rows.append({"pair": name, "pick": choice.pick, "left": sides[0].content, "right": sides[1].content})
    return rows


def without_count(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "done"} for row in rows]


def test_every_choice_of_a_person_is_kept_once_through_a_killed_server_and_a_closed_tab(
    browser: Any, server: Callable[..., Any], words: list[str], tmp_path: Path
) -> None:
    one = server(*words)
    tab = browser.open(one.start())
    sign_in(browser, "  Anna  ")
    made = [strike(browser, key) for key in KEYS[:4]]

    # A killed server: the choice waits in the page, and is there once when the server is back.
    before = seen(browser)
    one.kill()
    browser.press("ArrowLeft")
    browser.until("document.getElementById('status').innerText.includes('Not saved yet')")
    one.start()
    browser.until(f"document.body.dataset.pair !== '{before['pair']}'")
    made.append({**before, "pick": "left"})
    assert without_count(made) == recorded(tmp_path / "labels")

    # A tab that is closed while the server is gone: the choice is sent when the page is opened again.
    before = seen(browser)
    one.kill()
    browser.press("t")
    browser.until("document.getElementById('status').innerText.includes('Not saved yet')")
    browser.close(tab)
    tab = browser.open(one.start())
    browser.until("document.body.dataset.view === 'judge'")
    made.append({**before, "pick": "tie"})
    assert without_count(made) == recorded(tmp_path / "labels")

    # A tab that is closed before a choice: the same pair comes again, to the same rater.
    before = seen(browser)
    browser.close(tab)
    browser.open(one.start() if one.process is None else f"http://localhost:{one.port}")
    sign_in(browser, "Anna")  # localhost is another origin than 127.0.0.1, and so has a memory of its own
    assert seen(browser) == before

    # Undo takes the last choice back, and its pair comes again.
    taken_back = strike(browser, "b")
    browser.press("u")
    browser.until(f"document.body.dataset.pair === '{taken_back['pair']}'")
    while browser.run("document.body.dataset.view") == "judge":
        made.append(strike(browser, KEYS[len(made) % len(KEYS)]))
    assert "Thank you, Anna" in browser.run("document.body.innerText")
    assert without_count(made) == recorded(tmp_path / "labels")
    assert len(made) == 12 + 2
    with opened(tmp_path / "labels") as store:
        assert sum(bool(choice.undone) for choice in read_choices(store, undone=True)) == 1


def test_answers_are_shown_as_plain_text_and_nobody_learns_whose_they_are(
    browser: Any, server: Callable[..., Any], words: list[str]
) -> None:
    browser.open(server(*words, "--rater", "Bob").start())
    browser.until("document.body.dataset.view === 'judge'")
    shown = []
    while browser.run("document.body.dataset.view") == "judge":
        shown.append(seen(browser))
        assert "M1" not in browser.run("document.documentElement.outerHTML")
        if len(shown) == 1:
            browser.click("[data-pick=right]")
            browser.until(f"document.body.dataset.pair !== '{shown[0]['pair']}'")
        else:
            strike(browser, "1")
    assert HOSTILE in {text for one in shown for text in (one["left"], one["right"])}
    assert browser.run("document.title") == "Which answer is better? · Tunesmith"
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    assert browser.complaints == []


def test_a_held_key_chooses_once(browser: Any, server: Callable[..., Any], words: list[str], tmp_path: Path) -> None:
    browser.open(server(*words, "--rater", "Bob").start())
    browser.until("document.body.dataset.view === 'judge'")
    before = seen(browser)
    for repeating in (False, True, True, True):
        browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowLeft", autoRepeat=repeating)
    browser.until(f"document.body.dataset.pair !== '{before['pair']}'")
    browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowLeft", autoRepeat=True)
    assert browser.run("document.body.dataset.done") == "1"
    assert len(recorded(tmp_path / "labels")) == 1
