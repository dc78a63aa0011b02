"""The jobs page in a real browser: a job from its first step to an answer of the tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.slow

KEY = "a-key-of-some-length"
SMALL = {"forgetting": False, "shots": 0, "max_new_tokens": 4, "rank": 2, "test": 0.2, "max_steps": 300}
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def rows() -> bytes:
    words = ["".join("abcdefgh"[number // 8**place % 8] for place in range(3)) for number in range(40)]
    turns = [[{"role": "user", "content": w}, {"role": "assistant", "content": w.upper()}] for w in words]
    return "".join(json.dumps({"messages": one}) + "\n" for one in turns).encode()


def text(browser: Any, selector: str) -> str:
    return browser.run(f"document.querySelector({selector!r}).innerText")


def when(browser: Any, status: str) -> None:
    browser.until(f"document.body.dataset.status === '{status}'")


def test_a_job_is_watched_paused_resumed_and_tried(
    browser: Any, serve: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    server = serve(tiny_model_folder, jobs=tmp_path / "jobs", key=KEY)
    browser.open(f"{server.url}/jobs")

    # The page holds nothing; what it shows needs the key.
    browser.until("document.body.dataset.view === 'ask'")
    for attempt, view in (("wrong", "ask"), (KEY, "jobs")):
        browser.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
        browser.call("Input.insertText", text=attempt)
        browser.click("#unlock button")
        if attempt != KEY:
            browser.until("document.getElementById('status').innerText === 'This is not the key.'")
        browser.until(f"document.body.dataset.view === '{view}'")
    browser.until("document.body.innerText.includes('No job yet')")

    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 100, "batch_size": 4}}}
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        job = client.fine_tuning.jobs.create(
            model=server.hall.base_name,
            training_file=client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune").id,
            method=method,
            suffix="upper",
            extra_body={"tunesmith": {**SMALL, "instructions": HOSTILE}},
        )

    # The loss is drawn while the job is at work.
    browser.until(f"document.body.dataset.job === '{job.id}'")
    when(browser, "running")
    browser.until("Number(document.body.dataset.steps) > 3")
    browser.click("[data-do=pause]")
    when(browser, "paused")
    browser.click("[data-do=resume]")
    when(browser, "succeeded")
    browser.until("document.body.dataset.steps === '300'")
    assert len(browser.run("document.querySelector('path.train').getAttribute('d')")) > 1000
    assert browser.run("document.querySelectorAll('circle.valid').length") >= 1
    assert text(browser, "#latest").startswith("Step 300 of 300: training loss ")
    assert text(browser, "#name") == f"ft:{server.hall.base_name}:tunesmith:upper:{job.id[-8:]}"
    assert text(browser, "#decision") in ("Verdict: ship", "Verdict: do not ship", "Verdict: not shown")
    assert "Verdict" in text(browser, "#log")
    hidden = browser.run("[...document.querySelectorAll('[data-do]')].every((button) => button.hidden)")
    assert hidden

    # The tuned model answers in the chat box.
    browser.run("document.getElementById('say').focus()")
    browser.call("Input.insertText", text=HOSTILE)
    browser.click("#chat button")
    browser.until("document.body.dataset.replies === '1'")
    assert browser.run("document.querySelector('.turn.user').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('.turn.assistant').length") == 1

    # The report opens by its link, without the key.
    browser.open(server.url + browser.run("document.getElementById('report').getAttribute('href')"))
    browser.until("document.body.innerText.includes('Tunesmith')")
    assert HOSTILE in browser.run("document.body.textContent")
    assert browser.run("document.title") != "owned"
    assert [one for one in browser.complaints if "401" not in one] == []


def test_why_a_job_failed_stands_on_the_page(browser: Any, serve: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    server = serve(tiny_model_folder, jobs=tmp_path / "jobs")
    bad = rows() + json.dumps({"messages": [{"role": "user", "content": HOSTILE}]}).encode()
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("tickets.jsonl", bad), purpose="fine-tune").id
        client.fine_tuning.jobs.create(model=server.hall.base_name, training_file=file)
    browser.open(f"{server.url}/jobs")
    when(browser, "failed")
    assert "training/tickets.jsonl:41: the last message is from 'user'" in text(browser, "#error")
    assert browser.run("document.querySelector('[data-do=resume]').hidden")
    assert browser.complaints == []
