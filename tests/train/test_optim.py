"""The learning rate is a pure function of the step; AdamW moves bfloat16 weights as if they were float32."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tunesmith.train.checkpoint import resume, save_checkpoint
from tunesmith.train.optim import Optimization, adamw, learning_rate


def rates(steps: int, **values: object) -> list[float]:
    how = Optimization(learning_rate=1.0, **values)  # type: ignore[arg-type]
    return [learning_rate(step, steps, how) for step in range(steps)]


def test_linear_rises_to_the_peak_and_falls_to_the_last_step() -> None:
    assert rates(8, warmup=0.25) == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_falls_along_half_a_wave() -> None:
    wanted = [0.5, 1.0, *[0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]]
    assert rates(8, warmup=0.25, schedule="cosine") == pytest.approx(wanted)


def test_constant_stays_at_the_peak() -> None:
    assert rates(8, warmup=0.25, schedule="constant") == pytest.approx([0.5] + [1.0] * 7)


def test_a_run_of_one_step_uses_the_peak() -> None:
    assert rates(1) == [1.0]


@given(st.integers(1, 400), st.floats(0, 0.99), st.sampled_from(["linear", "cosine", "constant"]))
def test_every_schedule_rises_once_to_the_peak_and_never_leaves_zero_to_peak(
    steps: int, warmup: float, schedule: str
) -> None:
    found = rates(steps, warmup=warmup, schedule=schedule)
    top = found.index(max(found))
    assert found[top] == pytest.approx(1.0)
    assert all(0 < rate <= 1 + 1e-9 for rate in found)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found[top:]))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bfloat16_weights_move_as_the_float32_numbers_that_they_begin(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 25, generator=generator).bfloat16()
    whole, upper, beside = (nn.Parameter(start.to(torch.float32, copy=True)) for _ in range(3))
    upper.data = start.clone()
    how = Optimization(learning_rate=1e-4, weight_decay=decay)
    plain = torch.optim.AdamW([whole], lr=1e-4, weight_decay=decay, eps=how.epsilon, foreach=False)
    split = adamw([upper, beside], how)
    for _ in range(50):
        gradient = torch.randn(40, 25, generator=generator).bfloat16()
        whole.grad, upper.grad, beside.grad = gradient.float(), gradient, gradient.float()
        plain.step()
        split.step()
    bits = (upper.detach().view(torch.int16).to(torch.int32) << 16) + split.state[upper]["low"]
    for moved in (bits.view(torch.float32), beside.detach()):
        torch.testing.assert_close(moved, whole.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(upper.detach().float(), whole.detach(), rtol=2**-8, atol=0)


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = adamw([weight], Optimization(learning_rate=1e-4))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.99] * 4, abs=2**-8)


def test_a_resumed_split_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Linear(6, 5, bias=False, dtype=torch.bfloat16)

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            module.weight.grad = torch.randn(5, 6, generator=generator).bfloat16()  # type: ignore[union-attr]
            optimizer.step()

    how = Optimization(learning_rate=1e-3)
    whole, half, rest = model(), model(), model()
    half.load_state_dict(whole.state_dict())
    through, first, second = (adamw(module.parameters(), how) for module in (whole, half, rest))
    train(whole, through, range(6))
    train(half, first, range(3))
    save_checkpoint(tmp_path, 3, half, first, {})
    resume(tmp_path, rest, second)
    train(rest, second, range(3, 6))
    assert torch.equal(whole.weight, rest.weight)  # type: ignore[arg-type]
