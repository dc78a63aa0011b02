"""The blocks give the hidden states of the model's own forward pass, and stand aside where they do not know one."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tunesmith.model.attention import PackedAttention
from tunesmith.model.blocks import blocks_of
from tunesmith.model.load import Model
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora, lora_layers
from tunesmith.model.probe import probed_blocks
from tunesmith.tensors import Layout

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYOUT = Layout(lengths=(5, 6, 4), parents=(-1, 0, 0))
POSITIONS = torch.cat([torch.arange(5), torch.arange(5, 11), torch.arange(5, 9)])


def both_ways(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, attend = torch.arange(15) * 7 % 290, PackedAttention(LAYOUT)
    assert model.blocks
    with torch.no_grad():
        own = model.body(input_ids=tokens[None], position_ids=POSITIONS[None], use_cache=False, attend=attend)
    return model.blocks.answer(tokens, POSITIONS, attend), own.last_hidden_state[0]


def test_hidden_states_are_those_of_the_models_own_forward(tiny_model: Model) -> None:
    torch.testing.assert_close(*both_ways(tiny_model), rtol=1e-4, atol=1e-5)


def test_places_alone_have_the_states_that_they_have_among_all(tiny_model: Model) -> None:
    tokens, attend, index = torch.arange(15) * 7 % 290, PackedAttention(LAYOUT), torch.tensor([2, 14, 7])
    assert tiny_model.blocks
    whole = tiny_model.blocks.answer(tokens, POSITIONS, attend)
    torch.testing.assert_close(tiny_model.blocks.answer(tokens, POSITIONS, attend, index), whole[index])


def test_adapters_count_while_they_are_on(fresh_model: Model) -> None:
    plain, _ = both_ways(fresh_model)
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    with torch.no_grad():
        for layer in lora_layers(fresh_model.hf).values():
            layer.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    adapted, own = both_ways(fresh_model)
    torch.testing.assert_close(adapted, own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    with adapters_off(fresh_model.hf):
        torch.testing.assert_close(both_ways(fresh_model)[0], plain)


def test_numbers_computed_again_give_the_same_gradients_and_are_not_kept(fresh_model: Model) -> None:
    attach_lora(fresh_model.hf, LoraShape(rank=4, alpha=8.0), head=fresh_model.head)
    layers, blocks = lora_layers(fresh_model.hf).values(), fresh_model.blocks
    assert blocks
    kept, found = [], []
    for blocks.recompute in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        draw = torch.Generator().manual_seed(1)
        for layer in layers:
            layer.lora_b.data.normal_(generator=draw)
            layer.lora_a.grad = layer.lora_b.grad = None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = blocks.train(torch.arange(15) * 7 % 290, POSITIONS, PackedAttention(LAYOUT), torch.arange(15))
        kept.append(sum(sizes.values()))
        out.square().sum().backward()
        found.append([out, *(side.grad for layer in layers for side in (layer.lora_a, layer.lora_b))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    blocks.recompute = False
    block = blocks.step_bytes(15) / (len(blocks.blocks) + 1)  # one is at work
    assert kept[0] == pytest.approx(len(blocks.blocks) * block, rel=0.3)
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Qwen3ForCausalLM, Qwen3Config), (MistralForCausalLM, lambda **k: MistralConfig(**k, sliding_window=4))],
)
def test_a_block_with_more_in_it_or_a_window_keeps_its_own_forward(kind: type, config: type) -> None:
    assert blocks_of(kind(config(**SMALL))) is None


def test_a_forward_that_gives_something_else_is_not_used(fresh_model: Model) -> None:
    """Here the embedding is scaled, which no module shows."""
    embed = fresh_model.hf.get_input_embeddings()
    assert probed_blocks(fresh_model.hf)
    fresh_model.body.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "input_ids": None, "inputs_embeds": 9 * embed(kwargs["input_ids"])}),
        with_kwargs=True,
    )
    assert probed_blocks(fresh_model.hf) is None


def test_the_blocks_of_a_plain_llama_are_known() -> None:
    from tunesmith.model.fused import use_fused
    from tunesmith.model.linear import use_fast_linear

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert blocks_of(model) is None
    use_fast_linear(model)
    use_fused(model)
    found = blocks_of(model)
    assert found
    assert len(found.blocks) == 2
