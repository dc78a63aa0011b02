"""Generation: the tokens of transformers' own loop, whatever is batched with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig

from tunesmith.data.pack import pack_one
from tunesmith.model.attention import NAME, register
from tunesmith.model.guesses import Guesses
from tunesmith.model.linear import use_fast_linear
from tunesmith.model.load import Model
from tunesmith.model.sample import Live, Row, Sampling, _inverse_cdf, sample, stopped
from tunesmith.model.score import score
from tunesmith.types import Completion, Example

GREEDY = Sampling(max_new_tokens=12, batch=4)
WARM = Sampling(max_new_tokens=10, temperature=1.0, seed=5, batch=4)


def prompts_of(seed: int = 0, count: int = 11, stem: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    start = draw.integers(3, 250, stem)
    return [np.concatenate([start, draw.integers(3, 250, int(draw.integers(1, 14)))]) for _ in range(count)]


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@torch.no_grad()
def plain_greedy(model: Model, prompt: np.ndarray, how: Sampling) -> list[int]:
    """Oracle: transformers.generate on one prompt at a time."""
    model.hf.set_attn_implementation("eager")
    try:
        ids = torch.from_numpy(prompt)[None]
        out = model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_new_tokens,
            do_sample=False,
            eos_token_id=list(model.eos_ids),
            pad_token_id=0,
        )
    finally:
        model.hf.set_attn_implementation(NAME)
    return out[0, len(prompt) :].tolist()


def lively(tiny_model: Model, window: int | None) -> Model:
    """A model with large random weights, whose every answer is another, and which ends some of them."""
    register()
    config = MistralConfig(
        vocab_size=len(tiny_model.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        tie_word_embeddings=False,
        initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    use_fast_linear(hf)
    model = Model(hf=hf, vocabulary=tiny_model.vocabulary, packs=True)
    said = {token for one in sample(model, prompts_of(), GREEDY) for token in one.tokens.tolist()[3:9]}
    return replace(model, vocabulary=replace(model.vocabulary, eos_ids=tuple(sorted(said))[:6]))


@pytest.fixture(scope="module")
def ends(tiny_model: Model) -> Model:
    return lively(tiny_model, None)


@pytest.fixture(scope="module")
def windowed(tiny_model: Model) -> Model:
    return lively(tiny_model, 6)


@pytest.mark.parametrize("stem", [0, 9], ids=["apart", "shared prefix"])
def test_greedy_answers_are_those_of_transformers(stem: int, ends: Model) -> None:
    prompts = prompts_of(stem=stem)
    found = sample(ends, prompts, GREEDY)
    assert tokens(found) == [plain_greedy(ends, prompt, GREEDY) for prompt in prompts]
    assert {one.stop for one in found} == {"end_of_turn", "length"}


@pytest.mark.parametrize("stem", [0, 3, 9])
def test_a_sliding_window_is_kept_while_generating(stem: int, windowed: Model) -> None:
    prompts = prompts_of(stem=stem, count=6)
    assert tokens(sample(windowed, prompts, GREEDY)) == [plain_greedy(windowed, p, GREEDY) for p in prompts]


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "drawn"])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 64])
def test_the_batch_size_changes_no_answer(batch: int, how: Sampling, ends: Model) -> None:
    prompts = prompts_of(stem=4)
    assert tokens(sample(ends, prompts, replace(how, batch=batch))) == tokens(sample(ends, prompts, how))


def test_the_order_of_prompts_changes_no_greedy_answer(ends: Model) -> None:
    prompts = prompts_of()
    order = np.random.default_rng(1).permutation(len(prompts))
    moved = sample(ends, [prompts[n] for n in order], GREEDY)
    assert tokens(moved) == [tokens(sample(ends, prompts, GREEDY))[n] for n in order]


def test_draws_depend_on_the_seed_and_the_row_alone(ends: Model) -> None:
    prompts = prompts_of()
    first = tokens(sample(ends, prompts, WARM))
    assert tokens(sample(ends, prompts, WARM)) == first
    assert tokens(sample(ends, prompts[:5], WARM)) == first[:5]
    assert tokens(sample(ends, [prompts[3][::-1].copy(), *prompts[1:]], WARM))[1:] == first[1:]
    assert tokens(sample(ends, prompts, replace(WARM, seed=6))) != first
    same = tokens(sample(ends, [prompts[0]] * 4, WARM))
    assert len({tuple(one) for one in same}) > 1


@pytest.mark.parametrize("how", [GREEDY, WARM, replace(WARM, temperature=0.5, top_p=0.8)], ids=str)
def test_log_probs_are_those_of_training(how: Sampling, ends: Model) -> None:
    prompts = prompts_of(stem=5)
    for prompt, one in zip(prompts, sample(ends, prompts, how), strict=True):
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(one.tokens))]).astype(np.float32)
        row = Example(tokens=np.concatenate([prompt, one.tokens]), weights=weights, id="r")
        with torch.no_grad():
            scored = score(ends, pack_one([row])).log_probs.numpy()
        np.testing.assert_allclose(one.log_probs, scored, atol=1e-4)


def test_every_end_of_turn_id_ends_an_answer_and_is_not_shown(ends: Model) -> None:
    for one in sample(ends, prompts_of(), GREEDY):
        inside, last = one.tokens[:-1].tolist(), int(one.tokens[-1])
        assert not set(inside) & set(ends.eos_ids)
        assert (last in ends.eos_ids) == (one.stop == "end_of_turn")
        shown = inside if one.stop == "end_of_turn" else [*inside, last]
        assert one.text == ends.tokenizer.decode(shown, skip_special_tokens=True)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_answer_is_longer_than_allowed(most: int, ends: Model) -> None:
    for one in sample(ends, prompts_of(), replace(GREEDY, max_new_tokens=most)):
        assert len(one.tokens) == most or (one.stop == "end_of_turn" and len(one.tokens) < most)


def answered(live: Live, prompt: np.ndarray, how: Sampling) -> tuple[Row, int]:
    """One answer, and how many passes it took."""
    row, passes = Row(prompt, how), 1
    live.admit([row])
    while not stopped(row, live.model):
        live.advance()
        passes += 1
    live.leave(row)
    return row, passes


@pytest.mark.parametrize("how", [GREEDY, WARM, replace(WARM, temperature=0.2, top_p=0.7, max_new_tokens=40)])
@pytest.mark.parametrize("window", [None, 6])
def test_guesses_save_passes_and_change_no_answer(how: Sampling, window: int | None, tiny_model: Model) -> None:
    model = lively(tiny_model, window)
    guessing, plain = (Live(model, 1, 64, guesses=guesses) for guesses in (True, False))
    asked, saved = prompts_of(count=4), 0
    for prompt in asked + asked:  # the second time the answers are known
        (expected, slow), (found, fast) = answered(plain, prompt, how), answered(guessing, prompt, how)
        assert found.tokens == expected.tokens
        assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert slow == len(expected.tokens)
        saved += slow - fast
    assert saved > 5


def test_rivals_are_kept_of_every_token_guessed_or_not(ends: Model) -> None:
    row = Row(np.array([5, 6, 7, 5, 6, 7, 5, 6]), GREEDY, alternatives=3)
    live = Live(ends, 1, 64)
    live.admit([row])
    while not stopped(row, ends):
        live.advance()
    assert [rivals[0][0] for rivals in row.rivals] == row.tokens


@given(words=st.lists(st.integers(0, 3), min_size=3, max_size=30), most=st.integers(0, 6), cut=st.integers(1, 5))
def test_a_guess_is_what_followed_the_last_time(words: list[int], most: int, cut: int) -> None:
    known = Guesses()
    for end in range(cut, len(words) + cut, cut):  # learned bit by bit, or at once: the same
        learned = words[: min(end, len(words))]
        known.learn(learned, len(learned) - (end - cut))
    expected: list[int] = []
    said = list(words)
    while len(expected) < most:
        for tail in (said[-2:], said[-1:]):
            places = [n for n in range(len(tail), len(words)) if words[n - len(tail) : n] == tail]
            if places:
                expected.append(words[places[-1]])
                said.append(words[places[-1]])
                break
        else:
            break
    assert known.guess(words[-2:], most) == expected


def test_no_prompts_no_answers(tiny_model: Model) -> None:
    assert sample(tiny_model, [], GREEDY) == []


def test_progress_counts_every_finished_row(ends: Model) -> None:
    told: list[int] = []
    sample(ends, prompts_of(), GREEDY, told.append)
    assert told == list(range(1, 12))


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    st.lists(st.floats(0, 1 - 2**-24, width=32), min_size=1, max_size=8),
    st.floats(0.0625, 1.0, width=32),  # float32 as the sampler sees it: 1 - 1e-9 is 1
)
def test_draws_stay_in_the_nucleus_and_follow_its_quantiles(
    masses: list[float], draws: list[float], top_p: float
) -> None:
    """Oracle: walk down the most likely tokens until they hold top_p, then until the draw is passed.

    Where nothing is cut off, tokens stay in their own order.
    """
    probabilities = torch.tensor(masses) / sum(masses)
    found = _inverse_cdf(probabilities.expand(len(draws), -1), torch.tensor(draws), top_p).tolist()
    order = list(range(len(masses)))
    if top_p < 1:
        order.sort(key=lambda n: (-float(probabilities[n]), n))
    nucleus, mass = [], 0.0
    while order and mass < top_p - 1e-6:
        nucleus.append(order.pop(0))
        mass += float(probabilities[nucleus[-1]])
    for draw, token in zip(draws, found, strict=True):
        place = nucleus.index(token) if token in nucleus else -1
        below = sum(float(probabilities[n]) for n in nucleus[:place])
        assert place >= 0
        assert below - 1e-5 <= draw * mass <= below + float(probabilities[token]) + 1e-5


def test_a_draw_next_to_one_stays_in_the_nucleus() -> None:
    probabilities = torch.full((1, 1000), 0.1 / 999)
    probabilities[0, 17] = 0.9
    for top_p in (0.1, 0.5, 0.89):
        assert _inverse_cdf(probabilities, torch.tensor([1 - 2**-24]), top_p).tolist() == [17]


def test_a_warm_model_draws_each_token_as_often_as_it_is_likely(ends: Model) -> None:
    prompt = prompts_of()[0]
    how = Sampling(max_new_tokens=1, temperature=1.5, batch=2000)
    drawn = np.array([one.tokens[0] for one in sample(ends, [prompt] * 2000, how)])
    with torch.no_grad():
        ends.hf.set_attn_implementation("eager")
        logits = ends.hf(torch.from_numpy(prompt)[None], use_cache=False).logits[0, -1]
        ends.hf.set_attn_implementation(NAME)
    wanted = torch.softmax(logits / 1.5, -1).numpy()
    counts = np.bincount(drawn, minlength=len(wanted)) / 2000
    assert np.abs(counts - wanted).max() < 4 * np.sqrt(wanted.max() / 2000)
