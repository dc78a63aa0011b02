"""Rollouts: what the policy itself says, written down before it is learned from, and the same again after a kill."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.pack import pack_groups, pack_one
from tunesmith.data.render import prompt_tokens
from tunesmith.errors import FolderError, TrainingError
from tunesmith.methods.annotate import Group, annotate
from tunesmith.methods.grpo import GrpoLoss, grpo_examples
from tunesmith.methods.order import shuffled
from tunesmith.methods.ppo import PpoLoss, imitated, ppo_examples
from tunesmith.methods.rollout import (
    Answer,
    RolloutPlan,
    RolloutSteps,
    Shape,
    ask,
    describe,
    read_rollout,
    repetition,
    settled,
    write_rollout,
)
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora
from tunesmith.model.sample import Sampling
from tunesmith.model.score import score
from tunesmith.model.values import attach_value_head
from tunesmith.tensors import Batch, Loss
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import StepDone, fit
from tunesmith.train.optim import Optimization
from tunesmith.types import Completion, Example, Item, Message
from tunesmith.world import World

ARMS = (68, 69, 70, 71)
HOW = Sampling(max_new_tokens=3, temperature=1.0, batch=16)
PLAN = RolloutPlan(rollouts=2, prompts=4, group=4, epochs=2, batch=8, budget_tokens=400, missing_end=-1.0, seed=3)
Weights = dict[str, Tensor]


def questions(count: int) -> list[Item]:
    return [
        Item(prompt=(Message(role="user", content=f"Which of {n}?"),), reference="", id=f"q{n}") for n in range(count)
    ]


def first_is(token: int) -> Callable[[Sequence[Answer]], list[float]]:
    """The bandit: 1 for an answer that begins with `token`."""
    return lambda answers: [float(answer.completion.tokens[0] == token) for answer in answers]


def by_group(groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]):  # type: ignore[no-untyped-def]
    ready, alike = grpo_examples(groups, scores, "rloo")
    return ready, {"alike": alike, "seen_before": before.get("rollout", -1.0)}


def critic(model: Model, reference: Model, kl: float) -> Shape:
    """What PPO does with scored answers; the reference is `reference`, or the model without its adapter."""

    def shape(groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]):  # type: ignore[no-untyped-def]
        known = annotate(model, groups, {"values": "old_values"}, budget_tokens=400)
        with adapters_off(model.hf) if reference is model else nullcontext():
            known = annotate(reference, known, {"log_probs": "reference"}, budget_tokens=400)
        return ppo_examples(known, scores, kl), {}

    return shape


def steps(model: Model, store: Path, *, plan: RolloutPlan = PLAN, shape: Shape = by_group, **changes) -> RolloutSteps:  # type: ignore[no-untyped-def]
    how = {"items": questions(6), "how": HOW, "reward": first_is(ARMS[0]), **changes}
    return RolloutSteps(model=model, plan=plan, shape=shape, store=store, **how)


def shown(model: Model, question: str, arm: int) -> Example:
    """An example of answering `question` with the token `arm` and the end of turn."""
    prompt = prompt_tokens((Message(role="user", content=question),), model.tokenizer)
    tokens = np.array([*prompt, arm, model.eos_ids[0]])
    return Example(tokens=tokens, weights=(np.arange(len(tokens)) >= len(prompt)).astype(np.float32), id=question)


@pytest.fixture(scope="module")
def arms(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of a model that answers any question with one of four tokens, each about as often, and ends.

    Its embeddings are far apart: they are the head as well, which a LoRA cannot move, only choose from.
    """
    model = load(str(tiny_model_folder), World())
    with torch.no_grad():
        model.head_weight.mul_(8)
    rows = [shown(model, str(item.prompt[0].content), arm) for item in questions(12) for arm in ARMS]
    source = SftSteps(rows, batch=16, epochs=10.0, budget_tokens=2000, world=World())
    folder = tmp_path_factory.mktemp("arms")
    for _ in fit(model, source, CrossEntropy(), Optimization(learning_rate=5e-3), folder, World()):
        pass
    return model.hf.state_dict()


@pytest.fixture
def policy(arms: Weights, fresh_model: Model) -> Model:
    fresh_model.hf.load_state_dict(arms)
    return fresh_model


def same(one: Batch, other: Batch) -> bool:
    tensors = ("tokens", "positions", "index", "targets", "weights", "owner")
    return (
        one.ids == other.ids
        and one.layout == other.layout
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        and one.extra.keys() == other.extra.keys()
        and all(torch.equal(part, other.extra[name]) for name, part in one.extra.items())
    )


def all_same(one: Sequence[Sequence[Batch]], other: Sequence[Sequence[Batch]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(same(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


# What is asked and what comes back


def test_answers_of_a_group_are_to_one_prompt_and_differ(policy: Model) -> None:
    items = questions(3)
    answers = ask(policy, items, 8, HOW, seed=5)
    assert [answer.item.id for answer in answers] == [item.id for item in items for _ in range(8)]
    assert len({answer.example.id for answer in answers}) == 24
    for answer in answers:
        prompt = prompt_tokens(answer.item.prompt, policy.tokenizer)
        wanted = [*prompt, *answer.completion.tokens.tolist()]
        trained = answer.example.weights > 0
        assert answer.example.tokens.tolist() == wanted
        assert trained.tolist() == [False] * len(prompt) + [True] * len(answer.completion.tokens)
        assert answer.example.extra["old_log_probs"][trained].tolist() == answer.completion.log_probs.tolist()
    assert len({tuple(answer.completion.tokens.tolist()) for answer in answers[:8]}) > 1
    again = ask(policy, items, 8, HOW, seed=5)
    assert [a.completion.tokens.tolist() for a in again] == [a.completion.tokens.tolist() for a in answers]
    other = ask(policy, items, 8, HOW, seed=6)
    assert [a.completion.tokens.tolist() for a in other] != [a.completion.tokens.tolist() for a in answers]


@torch.no_grad()
def test_log_probs_of_sampling_are_those_of_training_so_the_first_ratio_is_one(policy: Model, tmp_path: Path) -> None:
    for batch in steps(policy, tmp_path)(0):
        found = score(policy, batch)
        assert float((found.log_probs - batch.extra["old_log_probs"]).abs().max()) < 1e-4
        terms = GrpoLoss()(found, batch)
        assert terms.report["clipped"] == 0
        assert float(terms.sum) == pytest.approx(-float(batch.extra["advantages"].sum()), abs=1e-3)


def ended(tokens: list[int], stop: str) -> Answer:
    numbers = np.array(tokens)
    example = Example(tokens=numbers, weights=np.ones(len(tokens), dtype=np.float32), id="r")
    log_probs = np.full(len(tokens), -0.5, dtype=np.float32)
    completion = Completion(tokens=numbers, log_probs=log_probs, text="", stop=stop)  # type: ignore[arg-type]
    return Answer(item=questions(1)[0], example=example, completion=completion)


def test_an_answer_without_a_score_gets_the_penalty() -> None:
    assert settled([0.5, float("nan"), -3.0, float("inf")], -2.0) == [0.5, -2.0, -3.0, -2.0]


def test_pad_ends_no_answer_and_only_the_end_of_turn_does(policy: Model) -> None:
    """A model that says nothing but pad goes on to the limit: its answers have no end."""
    pad = policy.tokenizer.pad_token_id
    assert pad not in policy.eos_ids
    with torch.no_grad():
        policy.hf.lm_head.weight.zero_()
    answers = ask(policy, questions(2), 3, replace(HOW, temperature=0.0), seed=0)
    for answer in answers:  # all tokens are alike, and the first, the pad, is taken
        assert answer.completion.tokens.tolist() == [pad] * 3
        assert not answer.ended


def test_a_rollout_is_described_by_scores_lengths_repetition_and_entropy() -> None:
    answers = [ended([5, 5, 5, 5, 2], "end_of_turn"), ended([5, 6, 7], "length"), ended([2], "end_of_turn")]
    raw = [1.0, float("nan"), float("nan")]
    assert describe(answers, raw, settled(raw, -1.0)) == {
        "score": pytest.approx(-1 / 3),
        "score_sd": pytest.approx(np.std([1, -1, -1])),
        "length_tokens": 3.0,
        "repetition": pytest.approx(1 / 3 / 3),
        "entropy": pytest.approx(0.5),
        "unended": pytest.approx(1 / 3),
        "unscored": 2.0,
    }


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    assert repetition(np.array([1, 2, 3, 1, 2, 3, 1])) == pytest.approx(2 / 5)
    assert repetition(np.array([1, 1, 1, 1])) == 0.5
    assert repetition(np.array([1, 2])) == 0.0


# Written down and read back


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 99))
def test_a_rollout_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    groups = [
        tuple(
            Example(
                tokens=draw.integers(0, 300, size),
                weights=draw.integers(0, 2, size).astype(np.float32),
                id=f"é{size}#",
                extra={name: draw.normal(size=size).astype(np.float32) for name in ("old_log_probs", "advantages")},
            )
            for size in group
        )
        for group in sizes
    ]
    path = tmp_path_factory.mktemp("rollout") / "deeper" / "000000.safetensors"
    statistics = {"score": float(draw.normal()), "rollout": 3}
    write_rollout(path, groups, statistics)
    found, described = read_rollout(path)
    assert described == statistics
    assert [len(group) for group in found] == [len(group) for group in groups]
    for one, other in zip(sum(groups, ()), sum(found, ()), strict=True):
        assert one.id == other.id
        assert one.extra.keys() == other.extra.keys()
        for mine, theirs in [
            (one.tokens, other.tokens),
            (one.weights, other.weights),
            *[(one.extra[name], other.extra[name]) for name in one.extra],
        ]:
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_rollout_read_back_gives_the_same_batches(policy: Model, tmp_path: Path) -> None:
    first = steps(policy, tmp_path)
    batches = [first(step) for step in range(first.steps)]
    assert first.steps == 8
    assert first.statistics["rollout"] == 1
    assert first.statistics["seen_before"] == 0  # the shape was told of the rollout before
    with torch.no_grad():
        policy.body.norm.weight.mul_(3)  # what is read back no longer depends on the weights
    again = steps(policy, tmp_path)
    assert all_same(batches, [again(step) for step in range(again.steps)])
    backwards = steps(policy, tmp_path)
    assert all_same(batches[::-1], [backwards(step) for step in reversed(range(backwards.steps))])
    assert again.statistics == first.statistics


def test_every_group_is_seen_once_in_each_pass(policy: Model, tmp_path: Path) -> None:
    source = steps(policy, tmp_path, shape=lambda groups, scores, before: (unpushed(groups), {}))
    for rollout in range(2):
        for epoch in range(2):
            at = 4 * rollout + 2 * epoch
            seen = [name for step in (at, at + 1) for batch in source(step) for name in batch.ids]
            names = [name.split("#")[0] for name in seen]
            assert sorted(int(name.split("#")[1]) for name in seen) == list(range(16))
            assert all(len(set(names[place : place + 4])) == 1 for place in range(0, 16, 4))


def beside(model: Model, reference: Model) -> Shape:
    """PPO with an example to imitate beside every answer."""
    sampled, rows = critic(model, reference, 0.05), [shown(model, f"Like {n}?", ARMS[0]) for n in range(8)]

    def shape(groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]):  # type: ignore[no-untyped-def]
        ready, told = sampled(groups, scores, before)
        return ready + imitated(rows, 0.5), told

    return shape


@pytest.mark.parametrize("seed", range(3))
def test_every_step_has_its_share_of_answers_and_of_what_is_imitated_beside(
    seed: int, policy: Model, tmp_path: Path
) -> None:
    attach_value_head(policy)
    plan = replace(PLAN, rollouts=1, prompts=8, group=1, epochs=3, batch=2, seed=seed)
    source = steps(policy, tmp_path, plan=plan, shape=beside(policy, policy))
    passes = [[name for batch in source(step) for name in batch.ids] for step in range(source.steps)]
    assert len(passes) == 12
    for names in passes:
        assert sum(name.startswith("Like") for name in names) == 2
        assert len(names) == 4
    for epoch in range(3):
        assert len({name for names in passes[4 * epoch : 4 * epoch + 4] for name in names}) == 16


def test_a_rollout_in_one_step_keeps_its_order_with_and_without_imitation(policy: Model, tmp_path: Path) -> None:
    attach_value_head(policy)
    plan = replace(PLAN, rollouts=1, prompts=8, group=1, epochs=2, batch=8, budget_tokens=1)
    source = steps(policy, tmp_path, plan=plan, shape=beside(policy, policy))
    for epoch in range(2):
        found = [name for batch in source(epoch) for name in batch.ids]
        whole = [source.groups[n] for n in shuffled(plan.seed, 1_000_003 + epoch, 16)]
        assert found == [name for batch in pack_groups(whole, budget_tokens=1) for name in batch.ids]


def test_the_items_are_gone_through_before_one_is_asked_again(policy: Model, tmp_path: Path) -> None:
    plan = replace(PLAN, rollouts=3, prompts=4, group=1, epochs=1, batch=4)
    source = steps(policy, tmp_path, plan=plan, shape=lambda groups, scores, before: (unpushed(groups), {}))
    asked = [name.split("#")[0] for step in range(source.steps) for batch in source(step) for name in batch.ids]
    # A pass shuffles what a rollout holds, so only sets of whole rollouts are known: 4 of 6, the other 2 and 2, 4.
    assert len(set(asked[:4])) == len(set(asked[8:])) == 4
    assert Counter(asked) == Counter([f"q{n}" for n in range(6)] * 2)


def unpushed(groups: Sequence[Group]) -> list[Group]:
    return [tuple(replace(e, extra={**e.extra, "advantages": e.weights * 0}) for e in group) for group in groups]


def test_where_few_groups_are_left_every_step_has_one(policy: Model, tmp_path: Path) -> None:
    plan = replace(PLAN, rollouts=1, prompts=4, group=4, epochs=1, batch=4)
    source = steps(policy, tmp_path, plan=plan, shape=lambda groups, scores, before: (unpushed(groups)[:2], {}))
    seen = [tuple(name for batch in source(step) for name in batch.ids) for step in range(source.steps)]
    assert len(seen) == 4
    assert len(set(seen[:2])) == 2
    assert sorted(seen[:2]) == sorted(seen[2:])  # both again, neither more often than the other


def test_a_rollout_that_is_gone_is_not_made_again_by_a_model_that_has_learned_from_it(
    policy: Model, tmp_path: Path
) -> None:
    steps(policy, tmp_path)(0)
    (tmp_path / "000000.safetensors").unlink()
    with pytest.raises(FolderError, match="000000"):
        steps(policy, tmp_path)(1)


@pytest.mark.parametrize("damage", ["cut", "empty", "no header"])
def test_a_damaged_rollout_is_one_message(damage: str, policy: Model, tmp_path: Path) -> None:
    steps(policy, tmp_path)(0)
    path = tmp_path / "000000.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "no header": b"\xff" * 99}[damage])
    with pytest.raises(FolderError, match="000000"):
        steps(policy, tmp_path)(1)


# What must not be learned from


def test_scores_that_are_no_numbers_are_counted_and_learned_as_the_penalty(policy: Model, tmp_path: Path) -> None:
    source = steps(policy, tmp_path, reward=lambda answers: [float("nan")] * len(answers))
    (*_,) = source(0)
    assert source.statistics["unscored"] == 16
    assert source.statistics["score"] == -1.0


def test_a_rollout_whose_log_probs_are_no_numbers_is_refused(policy: Model, tmp_path: Path) -> None:
    with torch.no_grad():
        policy.body.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"entropy of rollout 1 is not a finite number"):
        steps(policy, tmp_path)(0)
    assert not list(tmp_path.iterdir())


def test_statistics_of_the_method_that_are_no_numbers_are_refused(policy: Model, tmp_path: Path) -> None:
    def shape(groups: Sequence[Group], scores: Sequence[float], before: Mapping[str, float]):  # type: ignore[no-untyped-def]
        return unpushed(groups), {"kl": float("inf")}

    with pytest.raises(TrainingError, match=r"kl of rollout 1 is not a finite number"):
        steps(policy, tmp_path, shape=shape)(0)


# Bandits whose optimum is known


@torch.no_grad()
def probability(model: Model, token: int = ARMS[0]) -> float:
    """How likely an answer begins with `token`, over all questions."""
    rows = []
    for item in questions(6):
        row = shown(model, str(item.prompt[0].content), token)
        first = (np.arange(len(row.tokens)) == len(row.tokens) - 2).astype(np.float32)
        rows.append(replace(row, weights=first))
    return float(score(model, pack_one(rows)).log_probs.exp().mean())


def learn(model: Model, source: RolloutSteps, loss: Loss, folder: Path, rate: float) -> list[StepDone]:
    how = Optimization(learning_rate=rate, warmup=0.0, epsilon=1e-5)
    return list(fit(model, source, loss, how, folder, World()))


def with_lora(model: Model, update: str) -> None:
    if update == "lora":
        attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)


@pytest.mark.parametrize(("update", "rate"), [("lora", 1e-2), ("full", 1e-3)])
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_arm_that_is_rewarded_is_chosen_nearly_always(
    method: str, update: str, rate: float, arms: Weights, tiny_model_folder: Path, policy: Model, tmp_path: Path
) -> None:
    assert 0.1 < probability(policy) < 0.5
    reference = policy if update == "lora" else load(str(tiny_model_folder), World())
    reference.hf.load_state_dict(arms)
    with_lora(policy, update)
    plan = replace(PLAN, rollouts=6, prompts=8, group=8, epochs=3, batch=32)
    if method == "ppo":
        attach_value_head(policy)
        source = steps(policy, tmp_path / "rollouts", plan=plan, shape=critic(policy, reference, 0.01))
        learn(policy, source, PpoLoss(), tmp_path, rate)
    else:
        learn(policy, steps(policy, tmp_path / "rollouts", plan=plan), GrpoLoss(), tmp_path, rate)
    assert probability(policy) > 0.9


def test_with_a_price_on_leaving_the_reference_the_policy_ends_where_the_formula_says(
    arms: Weights, tiny_model_folder: Path, policy: Model, tmp_path: Path
) -> None:
    """The best policy at price kl is p_ref(y) exp(r(y) / kl), normalised (arXiv 2305.18290, eq. 4)."""
    reference = load(str(tiny_model_folder), World())
    reference.hf.load_state_dict(arms)
    attach_value_head(policy)
    kl, before = 0.7, probability(policy)
    best = before * math.exp(1 / kl) / (before * math.exp(1 / kl) + 1 - before)
    assert before < 0.4
    assert best > 0.5
    plan = replace(PLAN, rollouts=18, prompts=12, group=8, epochs=2, batch=48)
    how = replace(HOW, max_new_tokens=2)
    source = steps(policy, tmp_path / "rollouts", plan=plan, shape=critic(policy, reference, kl), how=how)
    learn(policy, source, PpoLoss(), tmp_path, 1e-3)
    assert probability(policy) == pytest.approx(best, abs=0.06)


# Killed and resumed


@pytest.mark.parametrize("method", ["ppo", "grpo"])
@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    method: str, update: str, arms: Weights, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def train(folder: Path, until: int) -> tuple[list[StepDone], Weights, list[Mapping[str, float]]]:
        model = load(str(tiny_model_folder), World())
        reference = model if update == "lora" else load(str(tiny_model_folder), World())
        for one in (model, reference):
            one.hf.load_state_dict(arms)
        with_lora(model, update)
        if method == "ppo":
            attach_value_head(model)
        shape = critic(model, reference, 0.05) if method == "ppo" else by_group
        source = steps(model, folder / "rollouts", shape=shape)
        how = Optimization(learning_rate=5e-3, checkpoint_seconds=0.0)
        done, told = [], []
        loss = PpoLoss() if method == "ppo" else GrpoLoss()
        for one in fit(model, source, loss, how, folder / "checkpoints", World()):
            done.append(one)
            told.append(source.statistics)
            if one.step == until + 1:  # the step after `until` is lost, as when a process dies in it
                break
        return done, {name: p.detach().clone() for name, p in trainable(model.hf).items()}, told

    whole, wanted, told = train(tmp_path / "whole", 99)
    assert len(whole) == 8
    for until in range(1, 8):
        train(tmp_path / "parts", until)
    rest, found, told_again = train(tmp_path / "parts", 99)
    assert [one.step for one in rest] == [8]
    assert rest[-1].loss == whole[-1].loss
    assert told_again[-1] == told[-1]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for path in (tmp_path / "whole" / "rollouts").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / "rollouts" / path.name).read_bytes()


def test_a_rollout_lost_before_its_first_step_is_made_again_with_the_same_bits(policy: Model, tmp_path: Path) -> None:
    batches = steps(policy, tmp_path)(0)
    path = tmp_path / "000000.safetensors"
    before = path.read_bytes()
    path.rename(path.with_suffix(".tmp"))  # killed between writing it and giving it its name
    assert all_same([batches], [steps(policy, tmp_path)(0)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
