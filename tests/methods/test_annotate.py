"""Numbers that a model gives every trained token: those of each row alone, at their places, in the rows' order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.methods.annotate import annotate
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora
from tunesmith.model.values import value_head
from tunesmith.types import Example

Pairs = list[tuple[Example, Example]]
Makes = Callable[..., Pairs]


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_numbers_are_those_of_each_row_alone(
    budget: int,
    answers: Makes,
    head_model: Model,
    plain_hidden: Callable[[Model, np.ndarray], Tensor],
    plain_log_probs: Callable[[Model, Example], Tensor],
) -> None:
    groups = [(*pair, replace(pair[0], id="same name", extra={})) for pair in answers(4)]
    groups = [tuple(replace(e, extra={"kept": e.weights * 3}) for e in group) for group in groups]
    found = annotate(head_model, groups, {"log_probs": "old", "values": "v"}, budget_tokens=budget)
    assert [[e.id for e in group] for group in found] == [[e.id for e in group] for group in groups]
    head = value_head(head_model.hf)
    for before, after in zip(sum(groups, ()), sum(found, ()), strict=True):
        trained = np.flatnonzero(before.weights)
        with torch.no_grad():
            old = plain_log_probs(head_model, before).numpy()
            hidden = plain_hidden(head_model, before.tokens)[trained - 1]
            values = (hidden @ head.weight[0] + head.bias).numpy()
        assert after.tokens is before.tokens
        assert set(after.extra) == {"kept", "old", "v"}
        np.testing.assert_array_equal(after.extra["kept"], before.weights * 3)
        for name, wanted in (("old", old), ("v", values)):
            np.testing.assert_allclose(after.extra[name][trained], wanted, rtol=0, atol=1e-5)
            assert after.extra[name].dtype == np.float32
            assert not np.delete(after.extra[name], trained).any()


def test_the_reference_is_the_base_while_adapters_are_off(
    answers: Makes, fresh_model: Model, plain_log_probs: Callable[[Model, Example], Tensor]
) -> None:
    ((row, other),) = answers(1)
    with torch.no_grad():
        base = plain_log_probs(fresh_model, row).numpy()
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    with torch.no_grad():
        for name, parameter in fresh_model.hf.named_parameters():
            if name.endswith("lora_b"):
                parameter.fill_(0.1)
    names = {"log_probs": "reference"}
    ((tuned, _),) = annotate(fresh_model, [(row, other)], names, budget_tokens=999)
    with adapters_off(fresh_model.hf):
        ((plain, _),) = annotate(fresh_model, [(row, other)], names, budget_tokens=999)
    np.testing.assert_allclose(plain.extra["reference"][row.weights > 0], base, rtol=0, atol=1e-5)
    assert np.abs(tuned.extra["reference"] - plain.extra["reference"]).max() > 1e-2


def test_a_model_that_cannot_pack_gives_the_same_numbers(answers: Makes, head_model: Model) -> None:
    groups = answers(3)
    names = {"log_probs": "old", "values": "v"}
    packed = annotate(head_model, groups, names, budget_tokens=999)
    head_model.hf.set_attn_implementation("eager")
    plain = annotate(replace(head_model, packs=False), groups, names, budget_tokens=999)
    for one, other in zip(sum(packed, ()), sum(plain, ()), strict=True):
        for name in ("old", "v"):
            np.testing.assert_allclose(one.extra[name], other.extra[name], rtol=0, atol=1e-5)
