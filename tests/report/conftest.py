"""Run folders as a finished run leaves them, with plausible numbers, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

RATES = {
    "base": 0.02,
    "instructed": 0.11,
    "few_shot": 0.24,
    "nearest_neighbour": 0.41,
    "majority": 0.06,
    "lora": 0.71,
    "full": 0.74,
}
PROMPT_TOKENS = {"base": 31.2, "instructed": 118.2, "few_shot": 221.4, "lora": 31.2, "full": 31.2}
REPORTERS = ["F.3d", "U.S.", "S. Ct.", "Cal. App. 4th", "N.E.2d", "P.3d", "So. 2d", "A.2d"]
LOADING = {"src", "href", "xlink:href", "action", "data", "srcset"}
VOID = {"meta", "br", "img", "link", "input", "hr"}
INSTRUCTIONS = "Give the reporter's abbreviation of this citation. Answer with the abbreviation only."


class Outline(HTMLParser):
    """Checks that tags nest and collects text, ids and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in LOADING]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="session")
def outline() -> Callable[[str], Outline]:
    """Parses a page, and fails where its tags do not nest."""

    def parse(page: str) -> Outline:
        parser = Outline()
        parser.feed(page)
        parser.close()
        assert parser.stack == []
        return parser

    return parse


@pytest.fixture(scope="session")
def text_of(outline: Callable[[str], Outline]) -> Callable[[str], str]:
    """The words of a page, in order."""
    return lambda page: " ".join(" ".join(outline(page).words).split())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything in it; tests only read it."""
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run folder with as little as a run may leave."""
    return write_bare_run(tmp_path / "bare")


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`write_run`, for tests that change the folder."""
    return write_run


def estimate(scores: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Mean with a normal interval: close enough for a page."""
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    mean = float(scores.mean())
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(scores), "level": level}


def write_run(folder: Path, *, rows: int = 200, updates: tuple[str, ...] = ("lora", "full"), seed: int = 0) -> Path:
    """A whole run: every arm, answers of `rows` test rows, logs, plan and ledger."""
    generator = np.random.default_rng(seed)
    arms = [arm for arm in RATES if arm not in ("lora", "full") or arm in updates]
    difficulty = generator.random(rows)
    scores = {a: (0.3 * difficulty + 0.7 * generator.random(rows) < RATES[a] * 0.8 + 0.1).astype(float) for a in arms}
    references = generator.choice(REPORTERS, rows)
    (folder / "answers").mkdir(parents=True)
    for arm in arms:
        lines = [answer_line(arm, row, references[row], scores[arm][row]) for row in range(rows)]
        write_lines(folder / "answers" / f"{arm}.jsonl", lines)
    write_json(folder / "results.json", results(arms, scores, rows))
    write_json(folder / "plan.json", plan(updates))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(updates), sort_keys=False), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [line for arm in updates for line in log(arm, generator)])
    write_lines(folder / "ledger.jsonl", ledger())
    return folder


def write_bare_run(folder: Path) -> Path:
    """The least a run may leave: one update, scores without contrasts, and no other file."""
    folder.mkdir(parents=True)
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40, "level": 0.95}
    content = {
        "schema": 1,
        "verdict": {"decision": "not shown", "reasons": []},
        "arms": {
            "base": {"metrics": {"exact_match": score}},
            "lora": {"metrics": {"exact_match": score}, "train": {"seconds": 3.0}},
        },
        "task": {"metric": "exact_match"},
    }
    write_json(folder / "results.json", content)
    return folder


def answer_line(arm: str, row: int, reference: str, score: float) -> dict[str, Any]:
    """One test item as an arm answered it."""
    wrong = {
        "base": "This is a citation of a case in the law reports, and it says that",
        "instructed": "The reporter is Cal.",
    }
    others = [name for name in REPORTERS if name != reference]
    answer = reference if score else wrong.get(arm, others[(row * 7 + len(arm)) % len(others)])
    return {
        "id": f"{row:04x}9c1f",
        "prompt": f"Smith v. Jones No. {row}, {100 + row} {reference.upper()} {3 * row + 17} ({1960 + row % 60})",
        "reference": reference,
        "answer": answer,
        "scores": {"exact_match": score, "chrf": max(score, 0.1 + 0.4 * (row % 7) / 7)},
        "prompt_tokens": int(PROMPT_TOKENS.get(arm, 0)),
        "completion_tokens": 9,
    }


def results(arms: list[str], scores: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    """results.json as the run writes it."""
    updates = [arm for arm in arms if arm in ("lora", "full")]
    baselines = [arm for arm in arms if arm not in updates]
    pairs = [(a, b) for a in updates for b in baselines] + ([("lora", "full")] if len(updates) == 2 else [])
    return {
        "schema": 1,
        "verdict": {
            "decision": "ship",
            "reasons": [
                "LoRA beats the best prompt, few-shot with 3 examples, and the whole interval lies above zero.",
                "It beats copying the nearest training row, so it is more than lookup.",
                "General loss rises by 0.048 nats per token, within the limit of 0.2.",
            ],
        },
        "arms": {arm: arm_facts(arm, scores[arm]) for arm in arms},
        "contrasts": [
            {
                "a": a,
                "b": b,
                "metric": "exact_match",
                "difference": estimate(scores[a] - scores[b]),
                "p_value": 0.21 if b == "full" else 2e-9,
            }
            for a, b in pairs
        ],
        "forgetting": {arm: forgetting(0.048 if arm == "lora" else 0.163) for arm in updates},
        "savings": {
            "tuned": "lora",
            "prompted": "few_shot",
            "prompt_tokens_saved_fraction": 0.859,
            "break_even_requests": 41213,
        },
        "lora_versus_full": {
            "quality_fraction": {"value": 0.94, "low": 0.86, "high": 1.02, "n": rows, "level": 0.95},
            "flops_fraction": 0.67,
            "seconds_fraction": 0.71,
            "memory_fraction": 0.49,
            "checkpoint_fraction": 0.036,
        }
        if len(updates) == 2
        else {},
        "test_reads": 1,
        "data": {"train": 7009, "valid": 508, "test": rows, "dropped": 412},
        "task": {"metric": "exact_match", "instructions": INSTRUCTIONS},
        "base": "smollm2-135m-instruct",
        "machine": machine(),
        "best_prompted": "few_shot",
        "few_shot": {"k": 3},
        "plan": {
            arm: {
                "predicted": {"seconds": 281.0, "peak_memory_bytes": 2.3e9, "flops": 5.0e13},
                "measured": {"seconds": 312.4, "peak_memory_bytes": 2.1e9, "flops": 5.1e13},
            }
            for arm in updates
        },
        "census": {
            "read": 8129,
            "kept": 7717,
            "dropped": {"duplicate": 301, "conflict": 88, "overlong": 23},
            "flagged": {"near duplicate": 41},
        },
        "smallest_difference": {
            "value": 0.062,
            "explanation": "with power 80%, at a level of 95%",
        },
        "tunesmith": "0.1.0",
        "seconds": 1241.0,
    }


def arm_facts(arm: str, scores: np.ndarray) -> dict[str, Any]:
    """What results.json says of one arm."""
    facts: dict[str, Any] = {
        "metrics": {"exact_match": estimate(scores), "chrf": estimate(0.2 + 0.75 * scores)},
        "prompt_tokens_per_request": PROMPT_TOKENS.get(arm, 0.0),
        "completion_tokens_per_request": {"base": 24.0, "instructed": 11.3}.get(arm, 5.2)
        if arm in PROMPT_TOKENS
        else 0.0,
        "seconds": {"few_shot": 96.2, "instructed": 63.0}.get(arm, 41.0) if arm in PROMPT_TOKENS else 0.3,
    }
    if arm in ("lora", "full"):
        full = arm == "full"
        facts["train"] = {
            "seconds": 440.1 if full else 312.4,
            "tokens": 1_204_340,
            "flops": 7.6e13 if full else 5.1e13,
            "peak_memory_bytes": 4.3e9 if full else 2.1e9,
            "trainable_parameters": 134_515_008 if full else 4_884_480,
            "learning_rate": 3e-5 if full else 1e-3,
            "checkpoint_bytes": 5.4e8 if full else 1.95e7,
        }
    return facts


def forgetting(rise: float) -> dict[str, Any]:
    """General ability before and after."""

    def around(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "n": 300, "level": 0.95}

    return {
        "general_loss": {
            "before": around(2.914, 0.03),
            "after": around(2.914 + rise, 0.031),
            "change": around(rise, 0.006),
        },
        "general_accuracy": {"before": around(0.42, 0.05), "after": around(0.41, 0.05)},
        "kl_from_base": around(0.08 + rise / 3, 0.01),
    }


def plan(updates: tuple[str, ...]) -> dict[str, Any]:
    """plan.json."""
    return {
        "machine": machine(),
        "derived": [
            {
                "key": "train.epochs",
                "value": 3,
                "reason": "7,009 rows of 31 tokens: three passes before validation loss turns",
            },
            {
                "key": "lora.rank",
                "value": 16,
                "reason": "an adapter of 4.9 M parameters holds what 215,000 trained tokens teach",
            },
            {
                "key": "lora.learning_rate",
                "value": 0.001,
                "reason": "ten times the rate for full fine-tuning of this width",
            },
            {"key": "train.batch", "value": 32, "reason": "657 steps: enough for warm-up and four looks at validation"},
        ],
        "arms": {arm: {"steps": 657, "tokens": 1204340, "predicted": {"seconds": 281.0}} for arm in updates},
        "smallest_difference": {"value": 0.062, "explanation": ""},
    }


def machine() -> dict[str, Any]:
    """The machine a run saw."""
    return {
        "cpu": "x86-64, AVX-512",
        "cores": 2,
        "memory_bytes": 25e9,
        "device": "cpu",
        "torch": "2.13.0",
        "threads": 2,
    }


def recipe(updates: tuple[str, ...]) -> dict[str, Any]:
    """recipe.yaml, resolved."""
    return {
        "base": "smollm2-135m-instruct",
        "data": {"train": "builtin:legal_citations", "valid": 0.1, "test": 0.1, "seed": 0},
        "task": {"instructions": INSTRUCTIONS, "metric": "exact_match", "shots": 5},
        "method": "sft",
        "update": list(updates),
        "train": {"epochs": 3, "seed": 0},
        "evaluate": {"forgetting_limit": 0.2, "seed": 0, "level": 0.95},
        "out": "runs/legal_citations",
    }


def log(arm: str, generator: np.random.Generator, steps: int = 657) -> list[dict[str, Any]]:
    """metrics.jsonl lines of one arm."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        floor = 0.28 if arm == "full" else 0.33
        loss = floor + 1.9 * np.exp(-step / 90) + 0.12 * generator.standard_normal() * np.exp(-step / 600)
        lines.append(
            {
                "arm": arm,
                "step": step,
                "loss": loss,
                "learning_rate": 1e-3,
                "tokens": 1800 * step,
                "seconds": 0.47 * step,
            }
        )
        if step % 164 == 0 or step == 1:
            valid = floor + 0.1 + 1.8 * np.exp(-step / 100)
            lines.append(
                {"arm": arm, "step": step, "valid_loss": valid, "valid_metric": 0.72 - 0.68 * np.exp(-step / 150)}
            )
    return lines


def ledger() -> list[dict[str, Any]]:
    """ledger.jsonl lines."""
    same, long = "same prompt as citations.jsonl:3", "2,113 tokens, the model reads 2,048"
    kinds = [
        ("dropped", "duplicate", same, 301),
        ("dropped", "conflict", same, 88),
        ("dropped", "overlong", long, 23),
        ("flagged", "near duplicate", same, 41),
    ]
    return [
        {
            "source": f"citations.jsonl:{17 + 19 * number}",
            "id": f"{number:08x}",
            "action": action,
            "reason": reason,
            "detail": detail,
        }
        for action, reason, detail, rows in kinds
        for number in range(rows)
    ]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
