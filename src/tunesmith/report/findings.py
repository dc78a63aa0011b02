"""What the run found, in sentences: the same words head the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import FEWEST_ROWS, Estimate
from . import words
from .record import RunRecord, as_estimate, is_number, part

_COSTS = (("compute", "flops"), ("time", "seconds"), ("memory", "memory"), ("checkpoint", "checkpoint"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number of the first screen: what it is, the number, and what it rests on."""

    label: str
    value: str
    note: str


def decision(run: RunRecord) -> str:
    """`ship`, `do not ship` or `not shown`; the last where the run recorded no verdict."""
    return str(part(run.results, "verdict", "decision") or "not shown")


def reasons(run: RunRecord) -> list[str]:
    """The sentences recorded with the verdict, but for the first where more follow: `finding` says the same."""
    recorded = part(run.results, "verdict", "reasons") or []
    recorded = recorded[1:] or recorded
    return [str(reason) for reason in recorded] or ["The run recorded no reasons for its verdict."]


def finding(run: RunRecord) -> str:
    """One sentence with the numbers that decide."""
    if run.subject is None:
        return f"Nothing was tuned in this run: {len(run.arms)} arms were measured as they are."
    tuned, metric, name = words.arm_label(run, run.subject), run.metric, words.metric_label(run.metric)
    score, row = run.estimate(run.subject), run.contrast(run.subject, run.prompted)
    if score is None:
        return f"{tuned} was trained, but {name or 'no metric'} was not measured on held-out rows."
    if row is None or run.prompted is None:
        basis = f"{words.count(score.n)} held-out rows"
        shown = words.metric_text(metric, score.value)
        return f"{tuned} scores {shown} {name} on {basis} ({interval(metric, score)})."
    found: Estimate = row["estimate"]
    clear = found.n >= FEWEST_ROWS and (found.low > 0 or found.high < 0)
    against = words.arm_label(run, run.prompted)
    before, after = run.estimate(run.prompted), words.metric_text(metric, score.value)
    told = f"from {words.metric_text(metric, before.value)} with {against} " if before else f"over {against} "
    change = words.difference_text(metric, found.value)
    evidence = f"{change}, {interval(metric, found, difference=True)}, {words.p_text(row.get('p_value'))}"
    verb = ("lifts" if found.value > 0 else "lowers") if clear else "is not shown to change"
    held_out = f"{words.count(found.n)} held-out rows"
    return f"Tuning with {tuned} {verb} {name} {told}to {after} on {held_out}: {evidence}."


def setting(run: RunRecord) -> str:
    """What was tuned, how, on how much: the line under the title."""
    method = words.METHODS.get(run.method, run.method) if run.method != "reward" else ""
    unit = "pairs" if run.method == "reward" else "rows"
    rows = [
        f"{words.count(held)} {split} {unit}"
        for split, name in (("training", "train"), ("test", "test"))
        if is_number(held := part(run.results, "data", name))
    ]
    base = run.results.get("base") or part(run.recipe, "base")
    updates = " and ".join(words.arm_label(run, arm) for arm in run.tuned)
    return " · ".join(str(word) for word in (base, method, updates, *rows) if word)


def tiles(run: RunRecord) -> list[Tile]:
    """The numbers of the first screen; what was not measured says so."""
    subject = run.subject
    if subject is None:
        return []
    first = [score_tile(run, subject), gain_tile(run, subject, run.prompted)]
    return [*first, _tokens_tile(run), _forgetting_tile(run), cost_tile(run)]


def general_loss_change(run: RunRecord, arm: str | None) -> Estimate | None:
    """Rise of general loss by tuning, nats per token: as recorded, else after minus before without an interval."""
    measured = part(run.results, "forgetting", arm or "", "general_loss")
    recorded = as_estimate(part(measured, "change"))
    before, after = as_estimate(part(measured, "before")), as_estimate(part(measured, "after"))
    if recorded or before is None or after is None:
        return recorded
    change = after.value - before.value
    return Estimate(value=change, low=change, high=change, n=after.n, level=after.level)


def break_even(run: RunRecord) -> str:
    """When training is repaid by the tokens saved, in words."""
    if against_another_model(run):
        return "break-even not known: the teacher is another model"
    requests = part(run.results, "savings", "break_even_requests")
    saved = part(run.results, "savings", "prompt_tokens_saved_fraction")
    if is_number(requests):
        by = "by shorter answers " if is_number(saved) and saved <= 0 else ""
        return f"repaid {by}after {words.rounded_count(requests)} requests"
    if is_number(saved):
        return "training is not repaid in tokens"
    return "break-even not known"


def against_another_model(run: RunRecord) -> bool:
    """Whether the tokens saved are those of a teacher of another size, so that no compute is known for them."""
    saving = part(run.results, "savings")
    tokens, compute = (part(saving, f"{what}_saved_per_request") for what in ("tokens", "flops"))
    return is_number(tokens) and not is_number(compute)


def against_full(run: RunRecord, arm: str) -> str:
    """What an adapter keeps of full fine-tuning's gain, and at what share of its cost; empty where not compared."""
    found, name = part(run.results, f"{arm}_versus_full"), words.arm_label(run, arm)
    name = name[:1].upper() + name[1:]
    quality = as_estimate(part(found, "quality_fraction"))
    costs = [
        f"{words.percent(fraction)} of its {cost}"
        for cost, key in _COSTS
        if is_number(fraction := part(found, f"{key}_fraction"))
    ]
    if not found or not costs:
        return ""
    share = ", ".join(costs)
    if quality is None:
        note = part(found, "quality_note") or "it was not measured"
        return f"{name} took {share}. No share of the gain is given: {note}."
    kept = f"{words.percent(quality.value)} ({words.percent(quality.low)} to {words.percent(quality.high)})"
    return f"{name} keeps {kept} of full fine-tuning's gain over the best prompt, for {share}."


def score_tile(run: RunRecord, arm: str) -> Tile:
    """An arm's score on the deciding metric."""
    return estimate_tile(
        f"{words.metric_label(run.metric)}, {words.arm_label(run, arm)}", run.metric, run.estimate(arm)
    )


def estimate_tile(label: str, metric: str, found: Estimate | None) -> Tile:
    """A number with its interval and the rows it rests on, shown as that metric is."""
    if found is None:
        return Tile(label=label, value=words.ABSENT, note="not measured")
    note = f"{words.interval_text(metric, found)}, n = {words.count(found.n)}"
    return Tile(label=label, value=words.metric_text(metric, found.value), note=note)


def gain_tile(run: RunRecord, arm: str | None, other: str | None) -> Tile:
    """The paired difference of two arms on the deciding metric."""
    row = run.contrast(arm, other)
    against = words.arm_label(run, other) if other else "the best prompt"
    if row is None:
        return Tile(label=f"gain over {against}", value=words.ABSENT, note="not measured")
    value = words.difference_text(run.metric, row["estimate"].value, unit=False)
    unit = "points" if run.metric in words.SHARES else words.metric_label(run.metric)
    bounds = words.interval_text(run.metric, row["estimate"], difference=True)
    return Tile(label=f"gain over {against}", value=value, note=f"{bounds} {unit}")


def _tokens_tile(run: RunRecord) -> Tile:
    saved = part(run.results, "savings", "prompt_tokens_saved_fraction")
    if not is_number(saved):
        return Tile(label="prompt tokens per request", value=words.ABSENT, note="saving not measured")
    value = words.signed(f"{-100 * saved:+.0f}%")
    return Tile(label="prompt tokens per request", value=value, note=break_even(run))


def _forgetting_tile(run: RunRecord) -> Tile:
    change, limit = general_loss_change(run, run.subject), part(run.recipe, "evaluate", "forgetting_limit")
    if change is None:
        return Tile(label="general loss (forgetting)", value=words.ABSENT, note="not measured")
    value = words.signed(f"{change.value:+.3f}")
    note = f"nats per token; limit {limit:g}" if is_number(limit) else "nats per token"
    return Tile(label="general loss (forgetting)", value=value, note=note)


def cost_tile(run: RunRecord) -> Tile:
    """What training the subject took."""
    train = part(run.arms, run.subject or "", "train")
    memory, flops = part(train, "peak_memory_bytes"), part(train, "flops")
    notes = [f"{words.size(memory)} peak"] * is_number(memory) + [words.flops(flops)] * is_number(flops)
    return Tile(label="training time", value=words.seconds(part(train, "seconds")), note=", ".join(notes))


def interval(metric: str, estimate: Estimate, *, difference: bool = False) -> str:
    """`95% interval 68.0 to 74.0`."""
    bounds = words.interval_text(metric, estimate, difference=difference)
    return f"{words.level_text(estimate.level)} interval {bounds}"
