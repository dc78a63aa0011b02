"""The reward model against a plain loop: the score of each answer alone, at its end of turn, and the choices' odds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import pack_groups, pack_one
from tunesmith.methods.reward import BradleyTerry, at_the_end, read_there, rewards
from tunesmith.model.load import Model
from tunesmith.model.score import score
from tunesmith.model.values import value_head
from tunesmith.tensors import Batch
from tunesmith.train.checkpoint import trainable
from tunesmith.types import Example

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]
Hidden = Callable[[Model, np.ndarray], Tensor]
MARGINS = (0.0, 0.7, 2.0, 0.1, 0.4)


def judged(pairs: Pairs, *, share: bool = True) -> Batch:
    """The pairs in one stream, read at their ends."""
    groups = [[at_the_end(example, margin) for example in pair] for pair, margin in zip(pairs, MARGINS, strict=False)]
    (batch,) = pack_groups(groups, budget_tokens=10_000, share=share)
    return read_there(batch)


def alone(model: Model, example: Example, hidden: Hidden, place: int = -1) -> Tensor:
    head = value_head(model.hf)
    return (hidden(model, example.tokens)[place] * head.weight[0]).sum() + head.bias[0]


def gradients(model: Model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable(model.hf).items() if p.grad is not None}
    model.hf.zero_grad()
    return found


def test_the_score_is_read_at_the_end_of_turn_itself(answers: Makes, head_model: Model, plain_hidden: Hidden) -> None:
    pairs = answers(4)
    batch = judged(pairs)
    assert batch.tokens[batch.index].tolist() == [2] * 8
    assert 0 not in batch.tokens.tolist()  # the pad
    flat = [example for pair in pairs for example in pair]
    with torch.no_grad():
        found = score(head_model, batch, BradleyTerry.needs).values
        at_the_end_itself = torch.stack([alone(head_model, e, plain_hidden) for e in flat])
        before_it = torch.stack([alone(head_model, e, plain_hidden, -2) for e in flat])
    torch.testing.assert_close(found, at_the_end_itself, rtol=0, atol=1e-5)
    assert bool(((found - before_it).abs() > 1e-3).all())


@pytest.mark.parametrize("share", [True, False])
def test_values_and_gradients_of_packed_pairs_are_those_of_rows_alone(
    share: bool, answers: Makes, head_model: Model, plain_hidden: Hidden
) -> None:
    pairs = answers(5)
    batch = judged(pairs, share=share)
    assert len(batch.layout.parents) == (16 if share else 10)  # what all share, each pair's prompt, the answers
    loss = BradleyTerry()(score(head_model, batch, BradleyTerry.needs), batch).sum
    loss.backward()
    packed = gradients(head_model)
    plain = torch.zeros(())
    for (chosen, rejected), margin in zip(pairs, MARGINS, strict=True):
        r = alone(head_model, chosen, plain_hidden) - alone(head_model, rejected, plain_hidden) - margin
        plain = plain + torch.log1p(torch.exp(-r))
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    wanted = gradients(head_model)
    assert packed.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(packed[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert bool(wanted["value_head.weight"].abs().max() > 1e-2)


def test_the_loss_is_the_choices_negative_log_odds_as_a_sum(answers: Makes, head_model: Model) -> None:
    batch = judged(answers(5))
    scores = score(head_model, batch, BradleyTerry.needs)
    values = scores.values.double().tolist()
    wanted, right = 0.0, 0
    for n, margin in enumerate(MARGINS):
        wanted += math.log(1 + math.exp(-(values[2 * n] - values[2 * n + 1] - margin)))
        right += values[2 * n] > values[2 * n + 1]
    terms = BradleyTerry()(scores, batch)
    assert float(terms.sum.detach()) == pytest.approx(wanted, rel=1e-6)
    assert terms.report == {"accuracy": right}
    assert BradleyTerry().count(batch) == 5


def test_an_answer_is_trained_at_its_last_token_only(answers: Makes) -> None:
    ((chosen, _),) = answers(1)
    ready = at_the_end(chosen, 1.5)
    assert np.flatnonzero(ready.weights).tolist() == [len(chosen.tokens) - 1]
    assert ready.extra["margin"][-1] == 1.5
    assert not ready.extra["margin"][:-1].any()


def test_rewards_are_those_of_each_answer_alone_whatever_stands_beside_it(
    answers: Makes, head_model: Model, plain_hidden: Hidden
) -> None:
    flat = [example for pair in answers(30) for example in pair]
    order = np.random.default_rng(0).permutation(len(flat))
    mixed = [flat[n] for n in order]
    mixed[7] = replace(mixed[3], id="twin")
    found = rewards(head_model, mixed)
    with torch.no_grad():
        wanted = [float(alone(head_model, example, plain_hidden)) for example in mixed]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(rewards(head_model, []), [])


def test_an_answer_has_the_same_reward_whichever_token_ended_it(answers: Makes, head_model: Model) -> None:
    (pair,) = answers(1)
    model = replace(head_model, vocabulary=replace(head_model.vocabulary, eos_ids=(0, 2)))  # trained answers end with 2
    other = [replace(example, tokens=np.append(example.tokens[:-1], 0)) for example in pair]
    np.testing.assert_array_equal(rewards(model, other), rewards(model, pair))


def test_rewards_of_many_answers_to_one_prompt_go_through_several_streams(
    answers: Makes, head_model: Model, plain_hidden: Hidden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.methods.reward.SCORE_TOKENS", 70)
    ((first, _),) = answers(1)
    draw = np.random.default_rng(1)
    prompt = first.tokens[: int(np.flatnonzero(first.weights)[0])]
    rows = []
    for n in range(9):
        tokens = np.concatenate([prompt, draw.integers(3, 250, int(draw.integers(0, 60))), [2]])
        weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        rows.append(Example(tokens=tokens, weights=weights, id=str(n)))
    with torch.no_grad():
        wanted = [float(alone(head_model, row, plain_hidden)) for row in rows]
    np.testing.assert_allclose(rewards(head_model, rows), wanted, rtol=0, atol=1e-5)


def test_a_model_that_cannot_pack_gives_the_same_rewards(answers: Makes, head_model: Model) -> None:
    flat = [example for pair in answers(3) for example in pair]
    found = rewards(head_model, flat)
    head_model.hf.set_attn_implementation("eager")
    plainly = rewards(replace(head_model, packs=False), flat)
    np.testing.assert_allclose(plainly, found, rtol=0, atol=1e-5)


def test_answers_longer_than_a_prefix_of_each_other_keep_their_own_ends(
    head_model: Model, plain_hidden: Hidden
) -> None:
    """One answer begins with the whole of the other, its end of turn included."""
    tokens = np.concatenate([np.arange(10, 30), [2], np.arange(40, 43), [2]])
    rows = [
        Example(tokens=tokens[:size], weights=(np.arange(size) >= 18).astype(np.float32), id=str(size))
        for size in (21, 25)
    ]
    batch = read_there(pack_one([at_the_end(row) for row in rows]))
    with torch.no_grad():
        found = score(head_model, batch, BradleyTerry.needs).values
        wanted = torch.stack([alone(head_model, row, plain_hidden) for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
