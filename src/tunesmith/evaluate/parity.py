"""Is an export still the model that was judged? The other program's prompts, logits, answers and task score, compared.

The rows are test rows that the run has answered already. Nothing is chosen by them, so they are not read once more.
docs/export.md gives the reason for each bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ..data.render import as_turn, prompt_tokens
from ..errors import DataError, ModelError
from ..model.attention import PackedAttention
from ..model.linear import product
from ..model.load import Model
from ..model.sample import Sampling, sample
from ..tensors import Layout
from ..texts import text_tokens
from ..types import Contrast, Item
from . import other_program
from .metrics import higher_is_better

LOGIT_POSITIONS = 256  # at 150,000 tokens of vocabulary a file of 150 MB
LEAST_SAME_AGAIN = 0.95
MOST_SCORE_LOSS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an export may differ by. `logits` and `alike`, the share of answers that are identical or differ by a tie,
    are for exports that hold the same numbers; where weights are rounded, KL and the score decide."""

    kl_nats: float
    logits: float | None = None
    alike: float = 0.0
    score_loss: float = MOST_SCORE_LOSS


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One row: the question, what the judged model answered then, and what it answers now, as tokens and text."""

    item: Item
    prompt: list[int]
    before: str | None
    tokens: list[int]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The judged model: its answers, and its logits along the answers of the first `forced` rows."""

    rows: Sequence[Asked]
    forced: int
    logits: Float[np.ndarray, "positions V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the other program says of the same rows."""

    program: str
    prompts: Sequence[list[int]]
    tokens: Sequence[list[int]]
    texts: Sequence[str]
    logits: Float[np.ndarray, "positions V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An answer that is another text. `gap` is by how much the judged model preferred its own token, in logits."""

    id: str
    judged: str
    exported: str
    gap: float


def refer(model: Model, items: Sequence[Item], before: Sequence[str | None], how: Sampling) -> Reference:
    """Ask the judged model, with the engine it was judged with."""
    prompts = [_prompt(model, item) for item in items]
    found = sample(model, [np.array(prompt, dtype=np.int64) for prompt in prompts], how)
    rows = [
        Asked(item=item, prompt=prompt, before=told, tokens=one.tokens.tolist(), text=one.text.strip())
        for item, prompt, told, one in zip(items, prompts, before, found, strict=True)
    ]
    sizes = np.cumsum([len(row.tokens) for row in rows])
    forced = max(1, int((sizes <= LOGIT_POSITIONS).sum()))
    logits = [_logits(model, row.prompt + row.tokens[:-1], len(row.tokens)) for row in rows[:forced]]
    return Reference(rows=rows, forced=forced, logits=np.concatenate(logits))


def ask_elsewhere(kind: str, path: Path, base: str, reference: Reference, how: Sampling) -> Reply:
    """Open the export in the program that it is for. Raises ModelError with that program's last words."""
    longest = max(len(row.prompt) for row in reference.rows)
    rows = [
        {
            "messages": [as_turn(message) for message in row.item.prompt],
            "tools": [dict(tool) for tool in row.item.tools],
            "text": "" if row.item.prompt else row.item.reference,
            "tokens": row.prompt,
        }
        for row in reference.rows
    ]
    forced = [
        {"tokens": row.prompt + row.tokens[:-1], "last": len(row.tokens)} for row in reference.rows[: reference.forced]
    ]
    request = {
        "kind": kind,
        "path": str(path.resolve()),
        "base": base,
        "rows": rows,
        "forced": forced,
        "max_new_tokens": how.max_new_tokens,
        "batch": how.batch,
        "context_tokens": longest + how.max_new_tokens + 8,
    }
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
        run_elsewhere(request, Path(name))
        reply = json.loads((Path(name) / "reply.json").read_text(encoding="utf-8"))
        logits = np.load(Path(name) / "logits.npy")
    return Reply(
        program=reply["program"],
        prompts=reply["prompts"],
        tokens=[answer["tokens"] for answer in reply["answers"]],
        texts=[answer["text"].strip() for answer in reply["answers"]],
        logits=logits,
    )


def run_elsewhere(request: Mapping[str, Any], folder: Path) -> None:
    """Run `other_program.py` in a process of its own. Raises ModelError with its last words if it fails."""
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-P", str(other_program.__file__), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        what = f"the program that it is for could not use it: {last_words}"
        raise ModelError(what, where=str(request["path"]), fix="Choose another --to or --type, or report this.")


def differences(model: Model, reference: Reference, reply: Reply) -> list[Difference]:
    """Every answer with another text, and how close the judged model was to giving it."""
    found = []
    for row, tokens, text in zip(reference.rows, reply.tokens, reply.texts, strict=True):
        if text == row.text:
            continue
        pairs = zip(row.tokens, tokens, strict=False)
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        gap = float("inf")  # the same tokens, or one answer cut short: no matter of rounding
        if place is not None:
            logits = _logits(model, row.prompt + row.tokens[:place], 1)[0]
            gap = float(logits[row.tokens[place]] - logits[tokens[place]])
        found.append(Difference(id=row.item.id, judged=row.text, exported=text, gap=gap))
    return found


def compare(
    reference: Reference, reply: Reply, differing: Sequence[Difference], score: Contrast | None, bounds: Bounds
) -> dict[str, Any]:
    """Everything that was compared, and in `reasons` what falls short of the bounds."""
    rows, n = reference.rows, len(reference.rows)
    other_prompts = [row.item.id for row, p in zip(rows, reply.prompts, strict=True) if row.prompt != p]
    again = [row.text == row.before for row in rows if row.before is not None]
    logits = logit_differences(reference.logits, reply.logits)
    # Two logits that each move by d may change places if they are less than 2 d apart.
    ties = sum(one.gap <= 2 * (bounds.logits or 0.0) for one in differing)
    found = {
        "program": reply.program,
        "rows": n,
        "prompts": {"other_tokens": len(other_prompts)},
        "logits": {"rows": reference.forced, "positions": len(reference.logits), **logits},
        "answers": {
            "identical": (n - len(differing)) / n,
            "ties": ties,
            "unexplained": len(differing) - ties,
            "differing": [asdict(one) for one in differing[:10]],
        },
        "judged_again": {"rows": len(again), "identical": sum(again) / len(again) if again else None},
        "score": asdict(score) if score else None,
        "bounds": asdict(bounds),
    }
    reasons = []
    if other_prompts:
        reasons.append(f"{len(other_prompts)} of {n} prompts become other tokens, the first that of {other_prompts[0]}")
    return {**found, "reasons": [*reasons, *_shortfalls(found, bounds, score)]}


def _shortfalls(found: Mapping[str, Any], bounds: Bounds, score: Contrast | None) -> list[str]:
    """Sentences; comparisons are turned so that what is not a number falls short."""
    reasons = []
    largest, kl = found["logits"]["largest_difference"], found["logits"]["mean_kl_nats"]
    alike = 1 - found["answers"]["unexplained"] / found["rows"]
    again = found["judged_again"]["identical"]
    if bounds.logits is not None and not largest <= bounds.logits:
        reasons.append(f"a logit differs by {largest:.2g}, more than {bounds.logits:g}")
    if not kl <= bounds.kl_nats:
        reasons.append(f"the distributions differ by {kl:.2g} nats per token (KL), more than {bounds.kl_nats:g}")
    if not alike >= bounds.alike:
        reasons.append(f"{alike:.0%} of answers are identical or tied, fewer than {bounds.alike:.0%}")
    if again is not None and not again >= LEAST_SAME_AGAIN:
        what = "of the answers that were judged are given again by the run's own model"
        reasons.append(f"only {again:.0%} {what}: the base or the adapter is not the one that was judged")
    if score:
        sign = 1 if higher_is_better(score.metric) else -1
        d = score.difference
        if not sign * d.value >= -bounds.score_loss:
            interval = f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
            reasons.append(f"{score.metric} changes by {interval}, worse by more than {bounds.score_loss:g}")
    return reasons


def logit_differences(
    judged: Float[np.ndarray, "positions V"], exported: Float[np.ndarray, "positions W"]
) -> dict[str, float]:
    """Largest difference, mean KL(judged | exported) in nats, and the share of positions with the same best token."""
    if judged.shape != exported.shape:
        what = f"the export gives logits of {exported.shape[1]} tokens, the judged model of {judged.shape[1]}"
        raise ModelError(what, fix="Check that tokenizer and embedding of the base have the same size.")
    largest, kl, same = 0.0, 0.0, 0
    for one, other in zip(judged.astype(np.float64), exported.astype(np.float64), strict=True):
        largest = max(largest, float(np.abs(one - other).max()), key=lambda value: (np.isnan(value), value))
        p, q = (row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in (one, other))
        kl += float((np.exp(p) * (p - q)).sum())
        same += int(one.argmax() == other.argmax())
    n = len(judged)
    return {"largest_difference": largest, "mean_kl_nats": kl / n, "same_best": same / n}


def _prompt(model: Model, item: Item) -> list[int]:
    """The tokens of an item's turns; of plain text, which asks nothing, the first half."""
    if item.prompt:
        return prompt_tokens(item.prompt, model.tokenizer, item.tools)
    tokens = text_tokens(model.tokenizer, item.reference)
    if not tokens:
        raise DataError("a row without prompt and text", where=item.id, fix="Export with another run.")
    return tokens[: (len(tokens) + 1) // 2]


@torch.no_grad()
def _logits(model: Model, tokens: Sequence[int], last: int) -> Float[np.ndarray, "last V"]:
    row = torch.tensor([list(tokens)], device=model.device)
    if not model.packs:
        return model.hf(row, use_cache=False).logits[0, -last:].float().cpu().numpy()
    alone = PackedAttention(Layout.alone(len(tokens)))
    positions = torch.arange(len(tokens), device=model.device)[None]
    out = model.body(input_ids=row, position_ids=positions, use_cache=False, attend=alone)
    return product(out.last_hidden_state[0, -last:], model.head_weight).float().cpu().numpy()
