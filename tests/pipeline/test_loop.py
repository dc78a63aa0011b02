"""Several ranks look at held-out rows and stop as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tunesmith.folder import RunFolder, read_jsonl
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model
from tunesmith.pipeline.loop import Undertaking, carry_out
from tunesmith.screen import Screen
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World


def work(model: Model, examples: list[Example], world: World) -> Undertaking:
    """Looks that grow worse on the first rank and better on the others, as those of a judge that is never the same."""
    sign = 1.0 if world.leads else -1.0
    return Undertaking(
        name="full",
        model=model,
        source=SftSteps(examples, batch=4, epochs=1.0, budget_tokens=512, world=world, max_steps=4),
        loss=CrossEntropy(),
        how=Optimization(learning_rate=1e-3),
        watch=lambda step: {"cost": sign * step},
        decides="cost",
        describe=str,
        evaluations=4,
        patience=2,
    )


def test_all_ranks_stop_where_the_first_sees_no_improvement(
    fresh_model: Model,
    tiny_examples: list[Example],
    tmp_path: Path,
    two_ranks: Callable[[Callable[[World], object]], None],
) -> None:
    def rank(world: World) -> None:
        outcome = carry_out(
            work(fresh_model, tiny_examples, world), RunFolder(path=tmp_path), world, Screen(quiet=True)
        )
        assert outcome.done.step == 3
        assert outcome.best == {"step": 1.0, "cost": 1.0}

    two_ranks(rank)
    assert [line["cost"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "cost" in line] == [1.0, 2.0, 3.0]
