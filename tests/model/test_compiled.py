"""Compiled passes give what the plain ones give, each row by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.model import compiled
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.sample import Live, Row, Sampling, compiles, sample

F32 = np.float32


def drawn(model: Model, lengths: Sequence[int], shared: int, *, compiled: bool, guesses: bool = False) -> list[Row]:
    """Rows whose prompts begin with the same `shared` tokens, ten greedy passes on."""
    tokens = np.random.default_rng(0).integers(3, 250, (len(lengths) + 1, 80))
    rows = [Row(tokens[n, :length], Sampling(max_new_tokens=40), n) for n, length in enumerate(lengths)]
    live = Live(model, len(rows), 16, guesses=guesses, compiled_keys=math.inf if compiled else 0)
    if shared:
        live.share(tokens[-1, :shared])
    live.admit(rows)
    for _ in range(10):
        live.advance()
    return rows


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 30])
@pytest.mark.parametrize("lengths", [[5], [1, 33, 8, 8, 60]])
def test_a_compiled_pass_draws_what_a_plain_one_draws(
    lengths: list[int], shared: int, guesses: bool, tiny_model: Model
) -> None:
    plain, compiled = (drawn(tiny_model, lengths, shared, compiled=c, guesses=guesses) for c in (False, True))
    for one, other in zip(plain, compiled, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def test_adapters_are_in_a_compiled_pass(fresh_model: Model) -> None:
    base = drawn(fresh_model, [9, 4], 3, compiled=True)
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    for layer in lora_layers(fresh_model.hf).values():
        torch.nn.init.normal_(layer.lora_b, std=0.3)
    plain, compiled = (drawn(fresh_model, [9, 4], 3, compiled=c) for c in (False, True))
    assert [row.tokens for row in compiled] == [row.tokens for row in plain]
    assert [row.log_probs for row in compiled] != [row.log_probs for row in base]


def test_many_passes_are_compiled_and_few_are_not(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = compiled.compiled_pass
    monkeypatch.setattr(compiled, "compiled_pass", lambda *args: (seen.append(len(args[2])), whole(*args))[1])
    assert compiles(tiny_model)
    for passes in (4, 40):
        sample(tiny_model, [np.array([5, 6, 7])], Sampling(max_new_tokens=passes))
        assert bool(seen) is (passes == 40)


def attended(q, k, v, held, before, slots, places, scaling) -> np.ndarray:
    """Attention in float64, one head and one key at a time, of keys and queries that need no turning."""
    rows, size, groups = len(q), held[0].shape[-1], held[0].shape[1]
    heads = q.shape[1] // size
    keys, values = (part.astype(np.float64).copy() for part in held)
    for n in range(rows):
        keys[slots[n], :, places[n]] = k[n].reshape(groups, size)
        values[slots[n], :, places[n]] = v[n].reshape(groups, size)
    out = np.zeros((rows, heads, size))
    for n in range(rows):
        for h in range(heads):
            g = h // (heads // groups)
            own = slice(0, places[n] + 1)
            seen = np.concatenate([before[0][g], keys[slots[n], g, own]])
            logits = np.array([q[n, h * size : (h + 1) * size].astype(np.float64) @ key * scaling for key in seen])
            weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            out[n, h] = weights @ np.concatenate([before[1][g], values[slots[n], g, own]])
    return out.reshape(rows, -1)


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 3), repeats=st.integers(1, 3), shared=st.integers(0, 9),
    wide=st.floats(0.01, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_is_that_of_float64(
    rows: int, groups: int, repeats: int, shared: int, wide: float, seed: int
) -> None:
    draw, size = np.random.default_rng(seed), 8
    q = draw.normal(0, wide, (rows, groups * repeats * size)).astype(F32)
    k, v = draw.normal(0, 1, (2, rows, groups * size)).astype(F32)
    held = draw.normal(0, 1, (2, rows, groups, 12, size)).astype(F32)
    before = draw.normal(0, 1, (2, groups, shared, size)).astype(F32)
    slots, places = draw.permutation(rows), draw.integers(0, 12, rows)
    straight = (np.ones((rows, size), F32), np.zeros((rows, size), F32))
    wanted = attended(q, k, v, held, before, slots, places, 0.3)
    out = np.empty_like(q)
    compiled._attend(
        (q, k, v), straight, (held[0], held[1]), (before[0], before[1]), (slots, places), F32(0.3), out
    )  # fmt: skip
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=3e-5)


def test_tokens_of_one_row_see_those_before_them_in_the_pass(tiny_model: Model) -> None:
    """Guessed tokens are fed with the token before them."""
    one_by_one, at_once = (np.zeros((2, 1, 6, 4), F32) for _ in range(2))
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 3, 4)).astype(F32)
    turn = (np.ones((3, 4), F32), np.zeros((3, 4), F32))
    none = (np.zeros((1, 0, 4), F32),) * 2
    places = np.array([2, 3, 4])
    together, alone = np.empty_like(q), np.empty_like(q)
    held = (at_once[:1], at_once[1:])
    compiled._attend((q, k, v), turn, held, none, (np.zeros(3, np.int64), places), F32(1), together)
    held = (one_by_one[:1], one_by_one[1:])
    for n in range(3):
        part = slice(n, n + 1)
        where = (np.zeros(1, np.int64), places[part])
        compiled._attend(
            (q[part], k[part], v[part]), (turn[0][part], turn[1][part]), held, none, where, F32(1), alone[part]
        )
    np.testing.assert_array_equal(together, alone)


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40))
def test_exponentials_are_right_to_the_last_bits(numbers: list[float]) -> None:
    logits = np.array(numbers, F32)
    wanted = np.exp(logits.astype(np.float64) - logits.max())
    found = logits.copy()
    mass = compiled._exponentials(found)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-30)
    assert mass == pytest.approx(wanted.sum(), rel=1e-5)


def test_what_is_no_number_stays_seen() -> None:
    logits = np.array([0, np.nan, 1], F32)
    assert np.isnan(compiled._exponentials(logits))


@given(rows=st.integers(1, 4), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_norm_of_a_sum_is_that_of_float64(rows: int, width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, late, out = draw.normal(size=(3, rows, width)).astype(F32)
    weight = draw.normal(size=width).astype(F32)
    wide = x.astype(np.float64) + late
    compiled._add_and_norm(x, late, weight, F32(1e-5), out)
    np.testing.assert_allclose(x, wide, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        out, wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight, rtol=1e-4, atol=1e-5
    )
