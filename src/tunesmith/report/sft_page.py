"""The page of a run that imitates examples: tuned against prompted, and what the prompt tokens saved are worth."""

from __future__ import annotations

from . import charts, distilled, examples, findings, tables, words
from .content import Page
from .findings import against_another_model
from .record import RunRecord, is_number, part

_SECTIONS = {
    "result": "Result",
    "cost": "Cost",
    "forgetting": "Forgetting",
    "training": "Training",
    "plan": "Plan",
    "data": "Data",
    "examples": "Examples",
    "reproduce": "Reproduce",
}


def sft_page(run: RunRecord) -> Page:
    """What an sft run found."""
    groups = examples.outcomes(run)
    student = distilled.is_distilled(run)
    return Page(
        template="sft_page.html.j2",
        finding=distilled.finding(run) if student else findings.finding(run),
        reasons=findings.reasons(run),
        tiles=[distilled.tile(run) if student and place == 1 else one for place, one in enumerate(findings.tiles(run))],
        brief=tables.brief_table(run, {"prompt tokens": lambda arm: words.count(_prompt_tokens(run, arm))}),
        sections=_SECTIONS,
        charts={"tokens": charts.tokens_chart(run)},
        tables={"collected": distilled.table(run)},
        more={
            "smallest_difference": _smallest_difference(run),
            "instructions": part(run.results, "task", "instructions") or part(run.recipe, "task", "instructions") or "",
            "break_even": _break_even(run),
            "against_full": [told for arm in run.tuned if (told := findings.against_full(run, arm))],
            "test_reads": run.results.get("test_reads"),
            "outcomes": examples.tally({examples.OUTCOMES[name]: len(rows) for name, rows in groups.items()}),
            "subject": words.arm_label(run, run.subject) if run.subject else "",
            "prompted": words.arm_label(run, run.prompted) if run.prompted else "",
            "examples": examples.shown_rows(run),
        },
    )


def _prompt_tokens(run: RunRecord, arm: str) -> object:
    return run.arms[arm].get("prompt_tokens_per_request") if run.kind(arm) != "lookup" else None


def _smallest_difference(run: RunRecord) -> str:
    """The least gain this test set can show, as recorded in results or plan."""
    found = run.results.get("smallest_difference") or run.plan.get("smallest_difference")
    value = part(found, "value")
    if not is_number(value):
        return ""
    told = words.difference_text(run.metric, value).removeprefix("+")
    explanation = part(found, "explanation")
    return f"The smallest difference this test set can show is {told}{f' ({explanation})' if explanation else ''}."


def _break_even(run: RunRecord) -> str:
    """How the break-even point follows from the tokens saved."""
    saving = part(run.results, "savings")
    fraction, requests = part(saving, "prompt_tokens_saved_fraction"), part(saving, "break_even_requests")
    if not is_number(fraction):
        return "Tokens per request were not compared between a tuned and a prompted arm, so no saving is known."
    against = words.arm_label(run, part(saving, "prompted") or run.prompted or "the best prompt")
    tuned = words.arm_label(run, part(saving, "tuned") or run.subject or "the tuned arm")
    if against_another_model(run):
        fewer = f"{words.percent(abs(fraction))} {'fewer' if fraction >= 0 else 'more'}"
        return (
            f"A request to {tuned} reads {fewer} prompt tokens than {against}. That is another model: what its tokens "
            "cost is not known, so neither is the break-even point."
        )
    if fraction <= 0:
        more = f"{words.percent(-fraction)} more" if fraction < 0 else "as many"
        told = f"A request to {tuned} reads {more} prompt tokens than {against}"
        if not is_number(requests):
            return f"{told}: training is not repaid in tokens."
        shown = words.rounded_count(requests)
        return f"{told}; by its shorter answers training is repaid after about {shown} requests."
    told = f"A request to {tuned} reads {words.percent(fraction)} fewer prompt tokens than {against}."
    saved = part(saving, "flops_saved_per_request")
    if is_number(saved) and saved <= 0:
        return f"{told} Its longer answers cost as much again or more: training is not repaid in tokens."
    if not is_number(requests):
        return f"{told} The compute of training is not known, so neither is the break-even point."
    return (
        f"{told} At 2 floating-point operations per parameter and token, those of answers included and the output "
        f"layer for these alone, training is repaid after about {words.rounded_count(requests)} requests. A server "
        "that caches prompt prefixes saves part of these tokens without tuning, which moves that point further out."
    )
