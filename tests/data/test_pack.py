"""Packing changes where tokens stand, never what a model says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import SHARE_FROM_TOKENS, bins, common_prefix, cut_to_fit, pack, pack_groups, pack_one
from tunesmith.model.load import Model
from tunesmith.model.score import score
from tunesmith.tensors import Batch
from tunesmith.types import Example


def example(tokens: list[int], scored: list[int], name: str = "r", **extra: np.ndarray) -> Example:
    weights = np.zeros(len(tokens), dtype=np.float32)
    weights[scored] = 1.0
    return Example(tokens=np.array(tokens, dtype=np.int64), weights=weights, id=name, extra=extra)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Rows over three token ids, so that long common prefixes are frequent; each trains at least one token."""
    stem = draw(st.lists(st.integers(0, 2), min_size=0, max_size=24))
    rows = []
    for number in range(draw(st.integers(1, 5))):
        kept = draw(st.integers(0, len(stem)))
        tokens = stem[:kept] + draw(st.lists(st.integers(0, 2), min_size=2, max_size=8))
        scored = draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1))
        rows.append(example(tokens, sorted(scored), str(number)))
    return rows


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 50))
def test_bins_hold_every_example_once_and_no_more_than_the_budget(sizes: list[int], budget: int) -> None:
    groups = bins(sizes, budget)
    assert sorted(item for group in groups for item in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[item] for item in group) <= budget


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 100))
def test_no_two_bins_would_fit_into_one(sizes: list[int], budget: int) -> None:
    totals = sorted(sum(sizes[item] for item in group) for group in bins(sizes, budget))
    assert len(totals) == 1 or totals[0] + totals[1] > budget


@given(examples())
def test_the_common_prefix_is_common_and_swallows_no_scored_position(rows: list[Example]) -> None:
    shared = common_prefix(rows)
    assert shared == 0 or shared >= SHARE_FROM_TOKENS
    for row in rows:
        assert row.tokens[:shared].tolist() == rows[0].tokens[:shared].tolist()
        assert int(np.flatnonzero(row.weights)[0]) - 1 >= shared  # the position that predicts it is the row's own


@st.composite
def grouped(draw: st.DrawFn) -> list[list[Example]]:
    """Groups whose rows begin alike, as answers to one prompt do; all groups may begin alike too."""
    stem = draw(st.lists(st.integers(0, 2), min_size=0, max_size=16))
    groups = []
    for number in range(draw(st.integers(1, 4))):
        prompt = stem + draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))
        rows = []
        for answer in range(draw(st.integers(1, 3))):
            tokens = prompt + draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
            scored = draw(st.sets(st.integers(len(prompt), len(tokens) - 1), min_size=1))
            rows.append(example(tokens, sorted(scored), f"{number}.{answer}"))
        groups.append(rows)
    return groups


def seen_by_the_model(batches: list[Batch]) -> dict[str, list[tuple[list[int], int]]]:
    """Oracle: each row's scored tokens with their contexts, walking the layout's chain of segments back."""
    seen: dict[str, list[tuple[list[int], int]]] = {}
    for batch in batches:
        starts = batch.layout.starts
        for index, target, owner in zip(
            batch.index.tolist(), batch.targets.tolist(), batch.owner.tolist(), strict=True
        ):
            segment = max(n for n, start in enumerate(starts) if start <= index)
            before: list[int] = []
            for part in batch.layout.ancestors(segment):
                before += batch.tokens[starts[part] : starts[part] + batch.layout.lengths[part]].tolist()
            context = before + batch.tokens[starts[segment] : index + 1].tolist()
            assert int(batch.positions[index]) == len(context) - 1
            seen.setdefault(batch.ids[owner], []).append((context, target))
    return seen


def wanted_of(rows: list[Example]) -> dict[str, list[tuple[list[int], int]]]:
    return {
        row.id: [(row.tokens[:t].tolist(), int(row.tokens[t])) for t in np.flatnonzero(row.weights)] for row in rows
    }


@given(examples(), st.booleans(), st.integers(1, 60))
def test_batches_score_every_trained_token_from_the_token_before_it(
    rows: list[Example], share: bool, budget: int
) -> None:
    assert seen_by_the_model(pack(rows, budget_tokens=budget, share=share)) == wanted_of(rows)


@given(grouped(), st.integers(8, 60))
def test_a_group_that_is_too_large_is_cut_where_the_budget_ends(groups: list[list[Example]], budget: int) -> None:
    for group in groups:
        parts = cut_to_fit(group, budget_tokens=budget)
        assert [row for part in parts for row in part] == group
        for part, after in zip(parts, [*parts[1:], []], strict=True):
            assert len(part) == 1 or len(pack_one(part).tokens) <= budget
            assert not after or len(pack_one([*part, after[0]]).tokens) > budget


@given(grouped(), st.booleans(), st.integers(1, 120))
def test_groups_stay_together_in_order_and_score_what_each_row_alone_would(
    groups: list[list[Example]], share: bool, budget: int
) -> None:
    batches = pack_groups(groups, budget_tokens=budget, share=share)
    assert seen_by_the_model(batches) == wanted_of([row for group in groups for row in group])
    whole = {tuple(row.id for row in group) for group in groups}
    for batch in batches:
        names = [name.split(".")[0] for name in batch.ids]
        inside = [tuple(i for i in batch.ids if i.split(".")[0] == name) for name in dict.fromkeys(names)]
        assert set(inside) <= whole
        assert [i for group in inside for i in group] == list(batch.ids)  # side by side
        assert len(inside) == 1 or len(batch.tokens) <= budget
        assert sum(batch.layout.lengths) == len(batch.tokens)
        assert all(parent < segment for segment, parent in enumerate(batch.layout.parents))
        assert batch.layout.real_tokens == sum(
            len(row.tokens) for group in groups for row in group if row.id in batch.ids
        )
    assert sum(len(batch.ids) for batch in batches) == sum(len(group) for group in groups)


def test_what_all_groups_share_and_what_each_group_shares_are_stored_once() -> None:
    start, prompts = list(range(50, 60)), [[1, 2, 3, 4], [5, 6, 7, 8]]
    groups = [
        [
            example(
                [*start, *prompt, 9, 30 + n, *[40] * n], range(len(start + prompt) + 1, len(start + prompt) + 2 + n)
            )  # type: ignore[arg-type]
            for n in range(3)
        ]
        for prompt in prompts
    ]
    (batch,) = pack_groups(groups, budget_tokens=999)
    assert batch.layout.parents == (-1, 0, 1, 1, 1, 0, 5, 5, 5)
    assert batch.layout.lengths == (10, 4, 2, 3, 4, 4, 2, 3, 4)  # the token before the first trained one is the row's
    assert batch.tokens[:14].tolist() == [*start, 1, 2, 3, 4]


def test_groups_with_the_same_prompt_share_it() -> None:
    start, first, second = list(range(50, 60)), list(range(1, 9)), list(range(20, 30))
    rows = [[*start, *prompt, 9, 40 + n] for n, prompt in enumerate((first, second, first, second, second))]
    groups = [[example(tokens, [len(tokens) - 1], str(n))] for n, tokens in enumerate(rows)]
    (batch,) = pack_groups(groups, budget_tokens=999)
    assert batch.layout.parents == (-1, 0, 1, 1, 0, 4, 4, 4)
    assert batch.layout.lengths == (10, 8, 2, 2, 10, 2, 2, 2)
    assert batch.ids == ("0", "1", "2", "3", "4")
    assert batch.targets.tolist() == [40, 41, 42, 43, 44]


def test_rows_behind_one_long_instruction_fill_a_batch_with_what_is_their_own() -> None:
    instruction = list(range(100, 400))
    rows = [example([*instruction, *[n] * 20, 9, n], [321], str(n)) for n in range(8)]
    (batch,) = pack(rows, budget_tokens=500)
    assert len(batch.tokens) == 300 + 8 * 22


def test_a_group_alone_and_groups_of_one_share_on_one_level() -> None:
    rows = [example([*range(50, 62), 9, n], [13], str(n)) for n in range(3)]
    (together,) = pack_groups([rows], budget_tokens=999)
    (apart,) = pack_groups([[row] for row in rows], budget_tokens=999)
    assert together.layout == apart.layout == pack_one(rows).layout
    assert together.layout.parents == (-1, 0, 0, 0)


def test_log_probs_and_gradients_of_groups_are_those_of_rows_alone(fresh_model: Model) -> None:
    draw = np.random.default_rng(0)
    start = draw.integers(3, 250, 11).tolist()
    groups = []
    for number in range(3):
        prompt = [*start, *draw.integers(3, 250, 9 + number).tolist()]
        sides = [[*prompt, *draw.integers(3, 250, size).tolist()] for size in (5, 2, 5)]
        groups.append([example(tokens, range(len(prompt), len(tokens)), f"{number}") for tokens in sides])  # type: ignore[arg-type]
    (shared,) = pack_groups(groups, budget_tokens=999)
    assert shared.layout.parents.count(-1) == 1
    assert len(shared.layout.parents) == 1 + 3 + 9
    found, gradients = [], []
    slope = torch.from_numpy(draw.normal(size=len(shared.targets))).float()
    alone = [pack_one([row]) for group in groups for row in group]
    for batches in ([shared], alone):
        log_probs = torch.cat([score(fresh_model, batch).log_probs for batch in batches])
        (log_probs * slope).sum().backward()
        found.append(log_probs.detach())
        gradients.append({name: p.grad.clone() for name, p in fresh_model.hf.named_parameters() if p.grad is not None})
        fresh_model.hf.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=5e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-5)


def test_numbers_of_scored_tokens_travel_with_them() -> None:
    rows = [
        example([5, 6, 7, 8], [2, 3], "a", advantage=np.array([0, 1, 2, 3], dtype=np.float32)),
        example([5, 9, 7], [1], "b", advantage=np.array([4, 5, 6], dtype=np.float32)),
    ]
    batch = pack_one(rows)
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.extra["advantage"].tolist() == [2, 3, 5]
    assert batch.owner.tolist() == [0, 0, 1]


def test_a_shared_prompt_is_stored_once(tiny_examples: list[Example]) -> None:
    shared = pack_one(tiny_examples[:10])
    alone = pack_one(tiny_examples[:10], share=False)
    prefix = common_prefix(tiny_examples[:10])
    assert prefix >= 20
    assert len(shared.tokens) == len(alone.tokens) - 9 * prefix
    assert shared.layout.parents == (-1, *[0] * 10)


@pytest.mark.parametrize("share", [True, False])
def test_packed_log_probs_are_those_of_each_row_alone(
    share: bool, tiny_examples: list[Example], tiny_model: Model
) -> None:
    rows = tiny_examples[:9]
    with torch.no_grad():
        packed = score(tiny_model, pack_one(rows, share=share)).log_probs
        alone = torch.cat([score(tiny_model, pack_one([row])).log_probs for row in rows])
        logits = [tiny_model_logits(tiny_model, row) for row in rows]
    plain = torch.cat([one[np.flatnonzero(row.weights)] for one, row in zip(logits, rows, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(packed, plain, rtol=0, atol=5e-6)


def tiny_model_logits(model: Model, row: Example) -> torch.Tensor:
    """Log-probability of each token of a row by the model's own attention; the first has none."""
    model.hf.set_attn_implementation("eager")
    try:
        logits = model.hf(torch.from_numpy(row.tokens)[None], use_cache=False).logits[0].double()
    finally:
        model.hf.set_attn_implementation("tunesmith_packed")
    chosen = torch.log_softmax(logits[:-1], -1).gather(1, torch.from_numpy(row.tokens)[1:, None])[:, 0]
    return torch.cat([torch.zeros(1, dtype=torch.float64), chosen]).float()


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_changing_one_example_moves_no_bit_of_another(
    tiny_examples: list[Example], tiny_model: Model, changed: int, seed: int
) -> None:
    rows = tiny_examples[:6]
    draw = np.random.default_rng(seed)
    prefix = common_prefix(rows)
    tokens = rows[changed].tokens.copy()
    tokens[prefix:] = draw.integers(3, 250, len(tokens) - prefix)
    tokens[prefix] = rows[changed].tokens[prefix]  # the shared part stays as long as it was
    other = Example(tokens=tokens, weights=rows[changed].weights, id="changed")
    with torch.no_grad():
        before, after = (
            score(tiny_model, pack_one(batch)).log_probs
            for batch in (rows, [other if n == changed else row for n, row in enumerate(rows)])
        )
    owner = pack_one(rows).owner
    assert torch.equal(before[owner != changed], after[owner != changed])
    assert not torch.equal(before[owner == changed], after[owner == changed])
