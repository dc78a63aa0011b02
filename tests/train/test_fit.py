"""The loop: how rows are cut into batches and ranks changes nothing, and what cannot go on says why."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import Interrupted, TrainingError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.tensors import Batch, LossTerms, Scores
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import StepDone, fit
from tunesmith.train.interrupt import graceful
from tunesmith.train.optim import Optimization
from tunesmith.types import Example
from tunesmith.world import World

# With the usual epsilon Adam's first steps depend on the sign of gradients that are nothing but rounding.
SMOOTH = Optimization(learning_rate=1e-2, epsilon=1e-3, clip=1e9)
STEPS = 6


@dataclass(frozen=True)
class Spoilt:
    """Cross-entropy that goes wrong at one call: the sum is multiplied by `factor`."""

    at: int
    factor: float
    calls: list[int] = field(default_factory=list)

    needs = CrossEntropy.needs

    def count(self, batch: Batch) -> float:
        return CrossEntropy().count(batch)

    def __call__(self, scores: Scores, batch: Batch) -> LossTerms:
        self.calls.append(1)
        terms = CrossEntropy()(scores, batch)
        return LossTerms(sum=terms.sum * self.factor) if len(self.calls) == self.at else terms


def fresh(folder: Path, update: str) -> Model:
    model = load(str(folder), World())
    if update == "lora":
        attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)
    return model


def steps(examples: Sequence[Example], world: World, budget: int, share: bool = True) -> SftSteps:
    source = SftSteps(examples, batch=8, epochs=1.0, budget_tokens=budget, world=world, max_steps=STEPS)
    source.share = share
    return source


def weights(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model.hf).items()}


def first_gradients(model: Model, source: SftSteps, folder: Path) -> dict[str, Tensor]:
    """Gradients of the first step, as the optimizer saw them."""
    next(fit(model, source, CrossEntropy(), SMOOTH, folder, World()))
    return {name: p.grad.clone() for name, p in trainable(model.hf).items() if p.grad is not None}


@pytest.mark.parametrize("update", ["lora", "full"])
def test_one_batch_of_eight_has_the_gradient_of_eight_batches_of_one(
    update: str, tiny_model_folder: Path, tiny_examples: list[Example], tmp_path: Path
) -> None:
    found = []
    for budget, share in ((4096, True), (4096, False), (100, True), (1, False)):
        source = steps(tiny_examples, World(), budget, share)
        assert len(source(0)) == {4096: 1, 100: len(source(0)), 1: 8}[budget]
        model = fresh(tiny_model_folder, update)
        found.append(first_gradients(model, source, tmp_path / f"{budget}{share}"))
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=2e-7)


def train(folder: Path, update: str, examples: list[Example], world: World, budget: int, out: Path) -> None:
    """Train a few steps and write losses, counts and weights."""
    model = fresh(folder, update)
    done = list(fit(model, steps(examples, world, budget), CrossEntropy(), SMOOTH, out / "checkpoints", world))
    save_file(weights(model), out / f"weights-{world.rank}.safetensors")
    lines = [[one.loss, one.gradient_norm, one.tokens] for one in done]
    (out / f"losses-{world.rank}.json").write_text(json.dumps(lines))


@pytest.mark.parametrize("update", ["lora", "full"])
def test_two_ranks_train_what_one_trains(
    update: str,
    tiny_model_folder: Path,
    tiny_examples: list[Example],
    tmp_path: Path,
    two_ranks: Callable[[Callable[[World], object]], None],
) -> None:
    two_ranks(lambda world: train(tiny_model_folder, update, tiny_examples, world, 4096, tmp_path))
    alone = tmp_path / "alone"
    alone.mkdir()
    train(tiny_model_folder, update, tiny_examples, World(), 4096, alone)
    one, first, second = (
        json.loads(path.read_text())
        for path in (alone / "losses-0.json", tmp_path / "losses-0.json", tmp_path / "losses-1.json")
    )
    assert first == second
    torch.testing.assert_close(torch.tensor(first)[:, :2], torch.tensor(one)[:, :2], rtol=1e-5, atol=1e-5)
    ours, theirs = (load_file(path / "weights-0.safetensors") for path in (alone, tmp_path))
    both = load_file(tmp_path / "weights-1.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(theirs[name], both[name])


def test_more_ranks_than_examples_in_a_step_are_refused(tiny_examples: list[Example]) -> None:
    with pytest.raises(TrainingError, match=r"train.batch: 4 processes cannot share steps of 2"):
        SftSteps(tiny_examples, batch=2, epochs=1.0, budget_tokens=99, world=World(rank=0, size=4))


@pytest.mark.parametrize(("factor", "what"), [(float("nan"), "loss"), (float("inf"), "loss"), (1e36, "gradient")])
def test_a_step_that_is_not_finite_stops_with_its_rows_and_leaves_the_weights(
    factor: float, what: str, fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    source = steps(tiny_examples, World(), 4096)
    loop = fit(fresh_model, source, Spoilt(at=3, factor=factor), SMOOTH, tmp_path, World())
    next(loop), next(loop)
    before = weights(fresh_model)
    with pytest.raises(TrainingError, match=f"the {what} of step 3 is not a finite number") as caught:
        next(loop)
    for row in source.rows(2):
        assert tiny_examples[row].id in str(caught.value)
    for name, value in weights(fresh_model).items():
        assert torch.equal(value, before[name])


def test_a_step_without_a_trained_token_names_its_rows(
    fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    silent = [Example(tokens=e.tokens, weights=e.weights * 0, id=e.id) for e in tiny_examples[:3]]
    with pytest.raises(TrainingError, match=r"rows row\d, row\d, row\d: no token is trained in step 1"):
        next(fit(fresh_model, steps(silent, World(), 4096), CrossEntropy(), SMOOTH, tmp_path, World()))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    said: list[str] = []
    done: list[StepDone] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 3 of 6") as caught, graceful(said.append) as stop:  # noqa: PT012
        for one in fit(
            fresh_model, steps(tiny_examples, World(), 4096), CrossEntropy(), SMOOTH, tmp_path, World(), stop=stop
        ):
            done.append(one)
            if one.step == 3:
                signal.raise_signal(signal.SIGINT)
    assert "Run the same command to go on." in str(caught.value)
    assert "Ctrl-C again" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), graceful(lambda text: None) as stop:  # noqa: PT012
        signal.raise_signal(number)
        assert stop()
        signal.raise_signal(number)


def test_a_step_says_what_it_cost(fresh_model: Model, tiny_examples: list[Example], tmp_path: Path) -> None:
    source = steps(tiny_examples, World(), 4096)
    done = list(fit(fresh_model, source, CrossEntropy(), SMOOTH, tmp_path, World()))
    tokens = 0
    for number, one in enumerate(done):
        tokens += sum(len(source.groups[row][0].tokens) for row in source.rows(number))
        assert (one.step, one.steps, one.tokens) == (number + 1, STEPS, tokens)
        assert one.seconds > 0
        assert one.memory_bytes > 1e7


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step(
    fresh_model: Model, tiny_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    source = steps(tiny_examples, World(), 4096)
    first = next(fit(fresh_model, source, CrossEntropy(), SMOOTH, tmp_path, World()))
    total, count = 0.0, 0
    for row in source.rows(0):
        example = tiny_examples[row]
        tokens = torch.from_numpy(example.tokens)
        tiny_model.hf.set_attn_implementation("eager")
        with torch.no_grad():
            log_probs = torch.log_softmax(tiny_model.hf(tokens[None]).logits[0, :-1], -1)
        tiny_model.hf.set_attn_implementation("tunesmith_packed")
        for place in range(1, len(tokens)):
            if example.weights[place]:
                total -= float(log_probs[place - 1, tokens[place]])
                count += 1
    assert first.loss == pytest.approx(total / count, rel=1e-5)
