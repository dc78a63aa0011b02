"""Weights kept as stored give what float32 weights give, bit for bit, and are kept so where float32 has no room."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model import stored
from tunesmith.model.adapters import save_adapter
from tunesmith.model.linear import SLICE, product, steady_product
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.many import Adapters
from tunesmith.model.merge import write_plain
from tunesmith.model.peft_layout import read_adapter
from tunesmith.model.sample import Row, Sampling, sample
from tunesmith.model.score import all_log_probs, hidden_states, score
from tunesmith.model.stored import kept_as
from tunesmith.recipe import Weights
from tunesmith.types import Example
from tunesmith.world import World

SHAPE = LoraShape(rank=4, alpha=8.0)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def short_folder(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model, its numbers cut to 16 bits, in two files."""
    folder = tmp_path_factory.mktemp(request.param)
    write_plain(tiny_model_folder, None, folder, getattr(torch, request.param))
    whole = folder / "model.safetensors"
    tensors, names = load_file(whole), {}
    for part, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        names |= dict.fromkeys(half, f"model-{part:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in half}, folder / names[half[0]], metadata={"format": "pt"})
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def both(folder: Path) -> tuple[Model, Model]:
    """Kept as stored, and in float32."""
    stored, float32 = load(str(folder), World(), "stored"), load(str(folder), World(), "float32")
    assert stored.packs
    assert stored.blocks
    assert float32.head_weight.dtype == torch.float32
    return stored, float32


def lively(model: Model) -> None:
    """An adapter that says something."""
    attach_lora(model.hf, SHAPE, head=model.head)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model.hf).values():
            layer.lora_b.normal_(0, 0.05, generator=draw)


def gradients(model: Model, examples: list[Example]) -> dict[str, Tensor]:
    """The loss of a step and the gradient of every adapter."""
    source, loss = SftSteps(examples, batch=24, epochs=1, budget_tokens=256, world=World()), CrossEntropy()
    found = {"loss": torch.zeros(())}
    for batch in source(0):
        value = loss(score(model, batch), batch).sum
        value.backward()
        found["loss"] += value.detach()
    return found | {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_only_matrices_are_kept_in_fewer_bits(short_folder: Path) -> None:
    short, float32 = both(short_folder)
    for (name, one), other in zip(short.hf.named_parameters(), float32.hf.parameters(), strict=True):
        assert one.dtype == (torch.float32 if "norm" in name else getattr(torch, str(short.weights.value))), name
        assert torch.equal(one.float(), other), name
    for one, other in zip(short.hf.buffers(), float32.hf.buffers(), strict=True):
        assert torch.equal(one, other)


def test_losses_and_gradients_are_those_of_float32_weights(short_folder: Path, tiny_examples: list[Example]) -> None:
    found = []
    for model in both(short_folder):
        lively(model)
        found.append(gradients(model, tiny_examples))
    assert len(found[0]) == 1 + 2 * 14
    assert same(*found)


def test_answers_and_their_probabilities_are_those_of_float32_weights(
    short_folder: Path, tiny_examples: list[Example]
) -> None:
    short, float32 = both(short_folder)
    prompts = [example.tokens[:12] for example in tiny_examples[:9]]
    for how in (Sampling(max_new_tokens=6, batch=4), Sampling(max_new_tokens=6, batch=1, temperature=1.0)):
        for one, other in zip(sample(short, prompts, how), sample(float32, prompts, how), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.log_probs.tolist() == other.log_probs.tolist()
    batch = SftSteps(tiny_examples, batch=8, epochs=1, budget_tokens=256, world=World())(0)[0]
    with torch.no_grad():
        one, other = (all_log_probs(hidden_states(m, batch), m.head_weight) for m in (short, float32))
    assert torch.equal(one, other)


def test_merged_or_beside_others_an_adapter_is_that_of_float32_weights(short_folder: Path, tmp_path: Path) -> None:
    hidden, x = [], torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for model in both(short_folder):
        lively(model)
        adapter = read_adapter(save_adapter(model, SHAPE, tmp_path / str(model.weights.value)))
        hidden.append(product(x, lora_layers(model.hf)["model.layers.0.self_attn.q_proj"].whole))
        served = Adapters(load(str(short_folder), World(), "stored" if not hidden[1:] else "float32"))
        served.add("one", adapter)
        served.route([Row(np.array([1]), Sampling(max_new_tokens=1), adapter="one")], [5])
        hidden.append(served.layers["model.layers.0.self_attn.q_proj"](x))
    assert torch.equal(hidden[0], hidden[2])
    assert torch.equal(hidden[1], hidden[3])


@pytest.mark.parametrize("multiply", [product, steady_product])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_matrix_is_widened_in_slices(multiply: Callable[[Tensor, Tensor], Tensor], rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 64, generator=draw), torch.randn(SLICE // 64 * 2 + 3, 64, generator=draw).bfloat16()
    torch.testing.assert_close(multiply(x, weight).double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
    back = torch.randn(rows, len(weight), generator=draw)
    torch.testing.assert_close(multiply(back, weight.T).double(), back.double() @ weight.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("wanted", "bytes_a_number", "short"),
    [("auto", 8.5, False), ("auto", 7.5, True), ("stored", 100.0, True), ("float32", 4.5, False)],
)
def test_float32_is_left_where_it_would_take_over_half_of_the_memory(
    wanted: Weights, bytes_a_number: float, short: bool, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "available_bytes", lambda device: int(bytes_a_number * numbers_in(short_folder)))
    found = kept_as(short_folder, wanted, World())
    assert (found.value != "float32") == short
    assert found.reason == ("as lora.weights asks, or full fine-tuning needs" if wanted != "auto" else found.reason)


def test_float32_is_counted_for_each_process_that_shares_the_memory(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "available_bytes", lambda device: int(8.5 * numbers_in(short_folder)))
    worlds = (World(), World(size=2, sharing=2), World(size=2))
    assert [kept_as(short_folder, "auto", world).value == "float32" for world in worlds] == [True, False, True]


def numbers_in(folder: Path) -> int:
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def test_unlike_types_stay_in_float32(tiny_model_folder: Path) -> None:
    assert load(str(tiny_model_folder), World(), "stored").head_weight.dtype == torch.float32


def test_weights_without_room_are_refused_with_what_would_fit(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = numbers_in(short_folder)
    monkeypatch.setattr(stored, "available_bytes", lambda device: 3 * numbers)
    assert kept_as(short_folder, "auto", World()).value != "float32"
    with pytest.raises(ModelError, match="With update: lora they can stay in b?float16"):
        kept_as(short_folder, "float32", World())
    monkeypatch.setattr(stored, "available_bytes", lambda device: numbers)
    with pytest.raises(ModelError, match="Choose a smaller base"):
        kept_as(short_folder, "auto", World())
