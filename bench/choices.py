"""Multiple choice by log-likelihood: ours, and one choice at a time through transformers; one JSON line.

    python bench/choices.py --items 100

Both score the same tokens and must come to the same answers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tunesmith.data.render import render_last
from tunesmith.evaluate.measure import choice_accuracies
from tunesmith.evaluate.systems import Prompting
from tunesmith.model.builtin import builtin_model
from tunesmith.model.load import load
from tunesmith.types import Conversation, Item, Message
from tunesmith.world import World

MMLU = Path(__file__).parent.parent.parent / "shared" / "data" / "retention" / "mmlu.jsonl"


def main() -> None:
    """Time both ways over the same items."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=100)
    wanted = parser.parse_args().items
    if not MMLU.exists():
        print("skipped: the data sets are not beside this checkout")
        return
    lines = [json.loads(line) for line in MMLU.read_text(encoding="utf-8").splitlines()]
    items = [
        Item(
            id=str(number),
            prompt=(Message(role="user", content=line["prompt"]),),
            reference=line["choices"][line["answer"]],
            choices=tuple(line["choices"]),
        )
        for number, line in enumerate(lines[:: len(lines) // wanted][:wanted])
    ]
    model = load("smollm2-135m-instruct", World())
    plain = AutoModelForCausalLM.from_pretrained(builtin_model("smollm2-135m-instruct"), dtype=torch.float32).eval()

    def one_at_a_time(items: list[Item]) -> np.ndarray:
        return np.array([float(item.choices[int(np.argmax(scores(item)))] == item.reference) for item in items])

    @torch.no_grad()
    def scores(item: Item) -> list[float]:
        found = []
        for text in item.choices:
            turns = (*item.prompt, Message(role="assistant", content=text))
            row = Conversation(messages=turns, id=item.id, source=item.id)
            example = render_last(row, model.tokenizer, model.eos_ids)
            tokens = torch.from_numpy(example.tokens)
            said = torch.log_softmax(plain(tokens[None], use_cache=False).logits[0, :-1], -1)
            of_each = said.gather(1, tokens[1:, None])[:, 0].numpy()
            found.append(float((of_each * example.weights[1:]).sum() / example.weights[1:].sum()))
        return found

    rates, right = {}, {}
    for name, way in (
        ("one_at_a_time", one_at_a_time),
        ("ours", lambda some: choice_accuracies(model, Prompting(name="base"), some)),
    ):
        way(items[:8])
        start = time.perf_counter()
        right[name] = way(items)
        rates[name] = round(len(items) / (time.perf_counter() - start), 2)
    alike = float((right["ours"] == right["one_at_a_time"]).mean())
    line = {"items": len(items), "items_per_second": rates, "ratio": round(rates["ours"] / rates["one_at_a_time"], 2)}
    print(json.dumps(line | {"alike": alike, "accuracy": float(right["ours"].mean())}))


if __name__ == "__main__":
    main()
