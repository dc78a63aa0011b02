"""Packed attention against the model's own attention on each row alone, in float64, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from tunesmith.errors import ModelError
from tunesmith.model.attention import NAME, PackedAttention, causal_attention, register
from tunesmith.tensors import Layout

ROUNDING = 2e-6  # transformers computes norms and rotations in float32 even in a float64 model
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "mistral, window 5": MistralConfig(**TINY, sliding_window=5),
    "qwen2, one layer windowed": Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
}
LAYOUTS = {
    "one row": Layout(lengths=(6,), parents=(-1,)),
    "equal rows": Layout(lengths=(5, 5, 5), parents=(-1, -1, -1)),
    "unequal rows": Layout(lengths=(3, 7, 1, 7), parents=(-1, -1, -1, -1)),
    "shared prompt": Layout(lengths=(6, 4, 4, 2), parents=(-1, 0, 0, 0)),
    "two prompts": Layout(lengths=(6, 4, 5, 4, 2), parents=(-1, 0, -1, 2, 0)),
    "a prompt within a prompt": Layout(lengths=(4, 3, 5, 2, 6, 2), parents=(-1, 0, 1, 1, 0, 4)),
}


def build(name: str) -> PreTrainedModel:
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=NAME).double().eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def stream(layout: Layout, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and positions of a layout."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 97, (sum(layout.lengths),), generator=generator)
    before = [sum(layout.lengths[p] for p in layout.ancestors(s)) for s in range(len(layout.lengths))]
    positions = torch.cat([torch.arange(b, b + n) for b, n in zip(before, layout.lengths, strict=True)])
    return tokens, positions


def packed_hidden(model: PreTrainedModel, layout: Layout, tokens: Tensor, positions: Tensor) -> Tensor:
    attend = PackedAttention(layout)
    model.set_attn_implementation(NAME)
    out = model.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, attend=attend)
    return out.last_hidden_state[0]


def plain_hidden(model: PreTrainedModel, layout: Layout, tokens: Tensor) -> Tensor:
    """Oracle: each segment after all that it continues, one row at a time, by the model's own attention."""
    model.set_attn_implementation("eager")
    parts = []
    for segment, length in enumerate(layout.lengths):
        chain = [*layout.ancestors(segment), segment]
        row = torch.cat([tokens[layout.starts[p] : layout.starts[p] + layout.lengths[p]] for p in chain])
        parts.append(model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0, -length:])
    return torch.cat(parts)


def gradients(model: PreTrainedModel, hidden: Tensor) -> list[Tensor]:
    """Gradients of a fixed random combination of the hidden states."""
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    parameters = [p for name, p in model.named_parameters() if "lm_head" not in name]
    return list(torch.autograd.grad((hidden * direction).sum(), parameters))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_packed_hidden_states_and_gradients_are_those_of_rows_alone(model: PreTrainedModel, layout: Layout) -> None:
    tokens, positions = stream(layout)
    packed = packed_hidden(model, layout, tokens, positions)
    found = gradients(model, packed)
    plain = plain_hidden(model, layout, tokens)
    torch.testing.assert_close(packed, plain, rtol=0, atol=ROUNDING)
    for one, other in zip(found, gradients(model, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=20 * ROUNDING)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Length and parent of each segment."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    return [(length, draw(st.integers(-1, place - 1))) for place, length in enumerate(lengths)]


@settings(max_examples=30)
@given(trees(), st.integers(0, 1000))
def test_any_tree_of_segments_is_packed_right(tree: list[tuple[int, int]], seed: int) -> None:
    model = WINDOWED
    layout = Layout(lengths=tuple(length for length, _ in tree), parents=tuple(parent for _, parent in tree))
    tokens, positions = stream(layout, seed)
    with torch.no_grad():
        packed = packed_hidden(model, layout, tokens, positions)
        torch.testing.assert_close(packed, plain_hidden(model, layout, tokens), rtol=0, atol=ROUNDING)


WINDOWED = build("qwen2, one layer windowed")


def test_training_and_generation_see_the_same_bits(model: PreTrainedModel) -> None:
    """With and without autograd the pieces are put together by different code."""
    tokens, positions = stream(LAYOUTS["two prompts"])
    with torch.no_grad():
        without = packed_hidden(model, LAYOUTS["two prompts"], tokens, positions)
    assert torch.equal(without, packed_hidden(model, LAYOUTS["two prompts"], tokens, positions).detach())


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_causal_attention_is_the_plain_loop(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, generator=generator).double() for h, n in ((4, 3), (2, 7), (2, 7)))
    out = causal_attention(query, key, value, 0.3, window)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                at = 4 + i
                first = 0 if window is None else max(0, at - window + 1)
                logits = key[b, h // 2, first : at + 1] @ query[b, h, i] * 0.3
                wanted = torch.softmax(logits, 0) @ value[b, h // 2, first : at + 1]
                torch.testing.assert_close(out[b, h, i], wanted)


def test_attention_that_is_not_known_is_refused(tiny_model_folder: Path) -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="padded batch"):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), attend=PackedAttention(LAYOUTS["one row"]))
    with pytest.raises(ModelError, match="softcap"):
        model(input_ids=torch.zeros(1, 6, dtype=torch.long), softcap=30.0, attend=PackedAttention(LAYOUTS["one row"]))
