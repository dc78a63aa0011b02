"""From measurements to a decision: estimates, paired contrasts, verdict, cost. Everything that results.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..evaluate.forgetting import Forgetting
from ..evaluate.metrics import higher_is_better
from ..evaluate.stats import contrast, equivalence, estimate, paired
from ..evaluate.verdict import decide, decide_equivalence
from ..recipe import Recipe
from ..report.cost import lora_versus_full, savings
from ..types import UNENDED, Contrast, Estimate, Measurement

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that was measured, before it becomes results.json."""

    measurements: Mapping[str, Measurement]
    trained: Mapping[str, Mapping[str, Any]]
    forgetting: Mapping[str, Forgetting]
    best_prompted: str
    shots: int
    subject: str
    product_parameters: int
    head_parameters: int
    facts: Mapping[str, Any]


def conclude(recipe: Recipe, found: Findings) -> dict[str, Any]:
    """The content of results.json."""
    level, seed, metric = recipe.evaluate.level, recipe.evaluate.seed, recipe.task.metric
    contrasts = _contrasts(recipe, found)
    lost = {arm: lost_ability(recipe, measured) for arm, measured in found.forgetting.items()}
    arms = {
        name: _arm(measurement, found.trained.get(name), level, seed)
        for name, measurement in found.measurements.items()
    }
    beside = {one.b: one for one in contrasts if (one.a, one.metric) == (found.subject, metric)}
    deciding = beside[found.best_prompted]
    own = {name: Estimate(**arms[name]["metrics"][metric]) for name in (found.subject, found.best_prompted)}
    rise = lost[found.subject]["general_loss"]["change"] if found.subject in lost else None
    harm, limit = Estimate(**rise) if rise else None, recipe.evaluate.forgetting_limit
    same = None
    if "distill" in found.facts:
        pair = (found.measurements[found.subject], found.measurements[found.best_prompted])
        same = equivalence(*pair, metric, recipe.evaluate.margin, level, seed)
        verdict = decide_equivalence(same, beside["base"], harm, limit)
    else:
        verdict = decide(
            deciding,
            harm,
            limit,
            others=[one for arm, one in beside.items() if arm != found.best_prompted and arm not in found.trained],
            tuned=own[found.subject],
            prompted=own[found.best_prompted],
            untried=found.facts.get("untried", ()),
            cut=float(np.mean(found.measurements[found.best_prompted].scores.get(UNENDED, 0.0))),
        )
    results = {
        "schema": SCHEMA,
        "tunesmith": __version__,
        "base": recipe.base,
        "task": {"metric": metric, "instructions": recipe.task.instructions},
        "verdict": asdict(verdict),
        "subject": found.subject,
        "best_prompted": found.best_prompted,
        "few_shot": {"k": found.shots},
        "arms": arms,
        "contrasts": [asdict(one) for one in contrasts],
        "forgetting": lost,
        "savings": _savings(recipe, found, arms),
        "plan": {name: _against_plan(train) for name, train in found.trained.items()},
        "test_reads": 1,
        **found.facts,
    }
    if same:
        results["distill"] = {**found.facts["distill"], "equivalence": asdict(same)}
    for tuned in ("lora", "economy"):
        if {tuned, "full"} <= set(found.trained):
            scores = {
                name: found.measurements[name].scores[metric].tolist() for name in (tuned, "full", found.best_prompted)
            }
            lower = not higher_is_better(metric)
            results[f"{tuned}_versus_full"] = lora_versus_full(
                arms, scores, found.best_prompted, lower_is_better=lower, tuned=tuned, level=level, seed=seed
            )
    return results


def _savings(recipe: Recipe, found: Findings, arms: Mapping[str, Any]) -> dict[str, Any]:
    """What the judged model saves; of compute only against its own base, not against a teacher of another size."""
    size = found.product_parameters if recipe.task.teacher.by in ("", recipe.base) else None
    return savings(arms, found.subject, found.best_prompted, size, found.head_parameters)


def _contrasts(recipe: Recipe, found: Findings) -> list[Contrast]:
    """Each tuned arm minus every other arm, on each metric that both have."""
    rows = []
    order = ["lora", "economy", "full"]
    for tuned in found.trained:
        others = [
            name for name in found.measurements if name not in found.trained or order.index(tuned) < order.index(name)
        ]
        for other in others:
            a, b = found.measurements[tuned], found.measurements[other]
            shared = [metric for metric in a.scores if metric in b.scores and metric != UNENDED]
            rows += [contrast(a, b, metric, recipe.evaluate.level, recipe.evaluate.seed) for metric in shared]
    return rows


def _arm(measurement: Measurement, train: Mapping[str, Any] | None, level: float, seed: int) -> dict[str, Any]:
    arm: dict[str, Any] = {
        "metrics": {name: asdict(estimate(scores, level, seed)) for name, scores in measurement.scores.items()},
        "prompt_tokens_per_request": float(measurement.prompt_tokens.mean()),
        "completion_tokens_per_request": float(measurement.completion_tokens.mean()),
        "seconds": measurement.seconds,
    }
    return {**arm, "train": {key: value for key, value in train.items() if key != "predicted"}} if train else arm


def lost_ability(recipe: Recipe, found: Forgetting) -> dict[str, Any]:
    level, seed = recipe.evaluate.level, recipe.evaluate.seed

    def beside(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> dict[str, Any]:
        before, after = np.asarray(before), np.asarray(after)
        each = {"before": estimate(before, level, seed), "after": estimate(after, level, seed)}
        return {name: asdict(found) for name, found in (each | {"change": paired(after, before, level, seed)}).items()}

    measures = {"general_loss": beside(found.before.losses, found.after.losses)}
    if len(found.before.correct):
        measures["general_accuracy"] = beside(found.before.correct, found.after.correct)
    return {**measures, "kl_from_base": {"after": asdict(estimate(found.kl, level, seed))}}


def _against_plan(train: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("seconds", "peak_memory_bytes", "flops")
    return {"predicted": train["predicted"], "measured": {key: train[key] for key in keys}}
