"""From a comparison to a decision: ship, do not ship, or not shown, and the sentences that say why.

docs/statistics.md has the rule, for users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..types import FEWEST_ROWS, Contrast, Decision, Equivalence, Estimate, Verdict
from .metrics import higher_is_better, is_binary
from .stats import improvement, smallest_difference, z_of

FEW_ROWS = 50
MANY_CUT = 0.05  # of the opponent's answers, from which on the reasons tell
PROMPTED_ARMS = frozenset({"base", "instructed", "few_shot"})


def decide(
    contrast: Contrast,
    forgetting: Estimate | None,
    forgetting_limit: float,
    *,
    others: Sequence[Contrast] = (),
    tuned: Estimate | None = None,
    prompted: Estimate | None = None,
    cut: float = 0.0,
    untried: Sequence[str] = (),
) -> Verdict:
    """Decide from `contrast` (tuned minus best prompted base) and `forgetting` (rise of general loss, nats per token).

    ship: the difference's interval lies on the better side of 0, and so does that of every prompted arm in `others`
    (tuned minus another arm, same metric); forgetting's lower end is not above the limit.
    do not ship: the interval lies on the worse side of 0, or that of any arm in `others` does, or forgetting's lower
    end is above the limit. not shown: anything else, and any contrast on fewer than FEWEST_ROWS items.
    `tuned` and `prompted`, the two arms' own estimates, `cut`, the share of the prompted arm's answers that the limit
    of tokens ended, and `untried`, the prompts that could not compete, are only told in the reasons.
    """
    gain, gain_reasons = _judge_gain(contrast)
    if contrast.difference.n >= FEWEST_ROWS:
        gain, more = _judge_others(gain, others)
        gain_reasons += more
    if cut > MANY_CUT:
        fix = "Raise task.max_new_tokens if it was about to be right."
        gain_reasons.append(f"The limit of answer tokens cut {cut:.0%} of {contrast.b}'s answers. {fix}")
    gain_reasons += [f"Not compared: {told}." for told in untried]
    harm, harm_reason = judge_forgetting(forgetting, forgetting_limit)
    decision: Decision = "do not ship" if harm else gain
    return Verdict(decision=decision, reasons=(_compare(contrast, tuned, prompted), *gain_reasons, harm_reason))


def decide_equivalence(
    found: Equivalence, over_base: Contrast, forgetting: Estimate | None, forgetting_limit: float
) -> Verdict:
    """Decide on a student that is to do without its teacher's prompt; forgetting counts as in `decide`.

    ship: equivalent or at least as good, and shown better than the base alone (`over_base`, student minus base): where
    it is not, the metric may not tell a good answer from a bad one. do not ship: worse, or too much forgotten.
    not shown: anything else.
    """
    harm, harm_reason = judge_forgetting(forgetting, forgetting_limit)
    as_good = found.finding in ("equivalent", "at least as good")
    learned = improvement(over_base.difference, found.metric)[0] > 0
    fine = as_good and learned
    decision: Decision = "do not ship" if harm or found.finding == "worse" else "ship" if fine else "not shown"
    scale, spec, unit = _scale(found.metric)
    difference, margin = found.difference, _amount(found.margin, found.metric)
    told = {
        "equivalent": f"it lies within {margin} on either side, so {found.a} is equivalent to {found.b}",
        "at least as good": f"it lies above the margin of {margin} less, so {found.a} is at least as good as {found.b}",
        "worse": f"it lies beyond the margin of {margin}, so {found.a} is worse than {found.b}",
        "not shown": f"it is not within the margin of {margin}, so equality is not shown; more test rows narrow it",
    }[found.finding]
    seen = (
        f"{found.a} minus {found.b}, {found.metric} on {_rows(difference.n)}: {scale * difference.value:{spec}}{unit}"
    )
    told = f"{_interval(difference, spec, scale)}; {told}." if difference.n >= FEWEST_ROWS else too_few(difference.n)
    reasons = [f"{seen}, {told}"]
    if as_good and not learned:
        beside = _interval(over_base.difference, spec, scale)
        blind = f"so {found.metric} may not tell good answers from bad ones here"
        reasons.append(f"But {found.a} is not shown better than the base without a prompt ({beside}), {blind}.")
    return Verdict(decision=decision, reasons=(*reasons, harm_reason))


def _judge_gain(contrast: Contrast) -> tuple[Decision, list[str]]:
    difference = contrast.difference
    low, high = improvement(difference, contrast.metric)
    if difference.n < FEWEST_ROWS:
        return "not shown", [too_few(difference.n)]
    reasons = []
    if low > 0:
        decision: Decision = "ship"
        reasons.append("The interval lies on the better side of 0, so the tuned model is better on rows like these.")
    elif high < 0:
        decision = "do not ship"
        reasons.append("The interval lies on the worse side of 0, so the tuned model is worse on rows like these.")
    else:
        decision = "not shown"
        reasons.append("The interval holds 0, so neither a gain nor a loss is shown.")
    if decision != "not shown" and contrast.p_value > 1 - difference.level:
        reasons.append(
            f"It is close: the test of no difference gives p = {contrast.p_value:.3f}. More rows would tell."
        )
    if difference.low < difference.high and (decision == "not shown" or difference.n < FEW_ROWS):
        reasons.append(_what_would_show(contrast))
    return decision, reasons


def _judge_others(gain: Decision, others: Sequence[Contrast]) -> tuple[Decision, list[str]]:
    """What the arms say that validation rows did not choose: `gain`, or less."""
    reasons = []
    for other in others:
        low, high = improvement(other.difference, other.metric)
        scale, spec, unit = _scale(other.metric)
        seen = f"difference {scale * other.difference.value:{spec}}{unit}, {_interval(other.difference, spec, scale)}"
        if high < 0:
            gain = "do not ship"
            reasons.append(f"{other.b} is shown to be better than {other.a}: {seen}.")
        elif low <= 0 and gain == "ship" and other.b in PROMPTED_ARMS:
            gain = "not shown"
            reasons.append(
                f"Validation rows spoke against {other.b}, but on the test rows it is not shown to be worse: {seen}."
            )
    return gain, reasons


def too_few(n: int) -> str:
    """Why there is no verdict on `n` rows."""
    return f"{_rows(n)} cannot carry a verdict: it takes at least {FEWEST_ROWS}."


def _what_would_show(contrast: Contrast) -> str:
    """The spread seen in this contrast, turned round: which true difference it would have taken."""
    difference = contrast.difference
    sd = (difference.high - difference.low) / (2 * z_of(difference.level)) * math.sqrt(difference.n)
    smallest = _amount(smallest_difference(difference.n, difference.level, sd=sd), contrast.metric)
    return f"With this spread, {_rows(difference.n)} show a true difference of {smallest} in 4 runs of 5."


def judge_forgetting(forgetting: Estimate | None, limit: float) -> tuple[bool, str]:
    """Whether harm is shown, and the sentence about it."""
    if forgetting is None:
        return False, "Forgetting was not measured."
    seen = f"General loss changed by {forgetting.value:+.3f} nats per token, {_interval(forgetting, '+.3f')}"
    if forgetting.low > limit:
        return True, f"{seen}: more is forgotten than the limit of {limit:g} allows."
    if forgetting.high > limit:
        side = "The estimate itself is above it" if forgetting.value > limit else "The estimate itself is not above it"
        return (
            False,
            f"{seen}: the interval straddles the limit of {limit:g}, so too much forgetting is not ruled out. {side}.",
        )
    return False, f"{seen}: within the limit of {limit:g}."


def _compare(contrast: Contrast, tuned: Estimate | None, prompted: Estimate | None) -> str:
    """One sentence with all numbers of the comparison."""
    difference, metric = contrast.difference, contrast.metric
    other = f"the best prompted base ({contrast.b})" if contrast.b in PROMPTED_ARMS else contrast.b
    scale, spec, unit = _scale(metric)
    interval = f"{_interval(difference, spec, scale)} (p = {contrast.p_value:.2g})"
    change = f"difference {scale * difference.value:{spec}}{unit}, {interval}"
    lower = "" if higher_is_better(metric) else ", lower is better"
    if tuned is None or prompted is None:
        return f"{contrast.a} against {other} on {_rows(difference.n)}, {metric}{lower}: {change}."
    if is_binary(metric):
        how = "exactly" if metric == "exact_match" else f"right by {metric}"
        share = f"{contrast.a} answers {100 * tuned.value:.1f}% of {_rows(tuned.n)} {how}"
        return f"{share}; {other} {100 * prompted.value:.1f}%; {change}."
    scores = f"{contrast.a} has a mean {metric} of {tuned.value:.4g} on {_rows(tuned.n)}{lower}"
    return f"{scores}; {other} {prompted.value:.4g}; {change}."


def _scale(metric: str) -> tuple[float, str, str]:
    """By what a difference of the metric is multiplied to be told, its format and its unit."""
    return (100.0, "+.1f", " points") if is_binary(metric) else (1.0, "+.4g", "")


def _interval(estimate: Estimate, spec: str, scale: float = 1.0) -> str:
    return f"{100 * estimate.level:g}% interval {scale * estimate.low:{spec}} to {scale * estimate.high:{spec}}"


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.1f} points" if is_binary(metric) else f"{value:.3g}"


def _rows(n: int) -> str:
    return f"{n} held-out row" if n == 1 else f"{n} held-out rows"
