"""A base rounded to 8 bits is a plain folder, and kept in 8 bits it is the model of that folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tunesmith.data.pack import pack_one
from tunesmith.errors import ModelError
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model import stored
from tunesmith.model.adapters import save_adapter
from tunesmith.model.eight_bits import STEPS, matrices, multiples, rounded, rounded_numbers
from tunesmith.model.few_rows import kept_twice
from tunesmith.model.linear import Linear, products_in
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, adapters_off, attach_lora, lora_layers
from tunesmith.model.many import Adapters
from tunesmith.model.merge import write_plain, write_rounded
from tunesmith.model.peft_layout import read_adapter
from tunesmith.model.sample import Row, Sampling, sample
from tunesmith.model.score import all_log_probs, hidden_states, score
from tunesmith.model.stored import EIGHT_BITS, kept_as
from tunesmith.recipe import Weights
from tunesmith.types import Example
from tunesmith.world import World

SHAPE = LoraShape(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rounded."""
    out = tmp_path_factory.mktemp("rounded")
    write_rounded(tiny_model_folder, out)
    return out


def both(folder: Path) -> tuple[Model, Model]:
    """Kept in 8 bits, and in float32, each with the same lively adapter."""
    models = load(str(folder), World(), "stored"), load(str(folder), World(), "float32")
    assert models[0].packs
    assert models[0].blocks
    for model in models:
        attach_lora(model.hf, SHAPE, head=model.head)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in lora_layers(model.hf).values():
                layer.lora_b.normal_(0, 0.05, generator=draw)
    return models


def gradients(model: Model, examples: list[Example]) -> dict[str, Tensor]:
    """The loss of a step and the gradient of every adapter."""
    source, loss = SftSteps(examples, batch=24, epochs=1, budget_tokens=256, world=World()), CrossEntropy()
    found = {"loss": torch.zeros(())}
    for batch in source(0):
        value = loss(score(model, batch), batch).sum
        value.backward()
        found["loss"] += value.detach()
    return found | {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}


def matrices_of(low: float, high: float) -> Iterator[Tensor]:
    for size in ((3, 5), (1, 300), (40, 1)):
        for scale in (low, 1e-3, 1.0, high):
            yield torch.randn(size, generator=torch.Generator().manual_seed(len(str(scale)))) * scale


def test_no_number_is_moved_by_more_than_half_a_step_of_at_most_nine_eighths_of_the_finest() -> None:
    for weight in matrices_of(1e-4, 1e3):
        found, steps = rounded(weight)
        finest = weight.abs().amax(1) / 127
        assert bool(((found.float() - weight).abs() <= 0.5001 * steps[:, None]).all())
        assert bool((steps >= finest * 0.9999).all())
        assert bool((steps <= torch.maximum(9 / 8 * finest, finest + 2.0**-24)).all())


@given(
    whole=st.lists(st.integers(-127, 127), min_size=1, max_size=20),
    digits=st.integers(1, 15),
    exponent=st.integers(-24, 4),
)
def test_float16_holds_every_multiple_of_a_step(whole: list[int], digits: int, exponent: int) -> None:
    step = torch.tensor([digits * 2.0**exponent])
    weight = (torch.tensor([whole]) * step[:, None]).half()
    found = multiples(weight, step)
    assert found is not None
    assert found.tolist() == [whole]
    again, steps = rounded(weight)
    assert multiples(again, steps) is not None


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_what_they_are() -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = 2.0**-24
    found, steps = rounded(weight)
    assert torch.equal(found.float(), weight)
    assert multiples(found, steps) is not None


@pytest.mark.parametrize("wrong", [0.5, 128.0, float("nan")])
def test_what_is_no_whole_multiple_is_not_taken_for_one(wrong: float) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, wrong]])
    assert multiples(weight, torch.ones(2)) is None


def test_every_matrix_but_embedding_and_output_layer_is_rounded(folder: Path, tiny_model_folder: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_folder, folder))
    names = {f"{name}.weight" for name in matrices(tiny_model_folder)}
    assert len(names) == 14
    assert rounded_numbers(folder) == sum(before[name].numel() for name in names)
    for name, weight in before.items():
        assert torch.equal(after[name], rounded(weight)[0] if name in names else weight.half()), name


def test_transformers_opens_the_folder_as_the_same_model(folder: Path, tiny_examples: list[Example]) -> None:
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        load(str(folder), World(), "stored"),
    )
    batch = pack_one([tiny_examples[0]], share=False)
    with torch.no_grad():
        found = all_log_probs(hidden_states(ours, batch), ours.head_weight)
        expected = torch.log_softmax(theirs(batch.tokens[None]).logits[0], -1)[batch.index]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_matrices_take_a_byte_a_number(folder: Path) -> None:
    eight = load(str(folder), World(), "stored")
    assert eight.weights.value == EIGHT_BITS
    for name, layer in eight.hf.named_modules():
        if isinstance(layer, Linear):
            assert layer.weight.dtype == (torch.float16 if layer is eight.head else torch.int8), name


def test_losses_and_gradients_are_those_of_float32_weights(folder: Path, tiny_examples: list[Example]) -> None:
    found, expected = (gradients(model, tiny_examples) for model in both(folder))
    assert len(found) == 1 + 2 * 14
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_layer_by_layer_too(folder: Path, tiny_examples: list[Example]) -> None:
    eight, float32 = both(folder)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    for off in (False, True):
        for name, layer in lora_layers(eight.hf).items():
            inputs = x.repeat(1, layer.in_features // 64)
            ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
            other = lora_layers(float32.hf)[name]
            layer.enabled = other.enabled = not off
            torch.testing.assert_close(layer.whole, other.whole, msg=name)
            y, expected = layer(ours), other(theirs)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, msg=name)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_rounded_products_stay_near(folder: Path, tiny_examples: list[Example]) -> None:
    eight, float32 = both(folder)
    with products_in("bfloat16"):
        found = gradients(eight, tiny_examples)
    expected = gradients(float32, tiny_examples)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("new_tokens", [6, 40])
def test_answers_are_those_of_float32_weights(
    folder: Path, tiny_examples: list[Example], batch: int, new_tokens: int
) -> None:
    prompts = [example.tokens[:12] for example in tiny_examples[:6]]
    for off in (False, True):
        found = []
        for model in both(folder):
            how = Sampling(max_new_tokens=new_tokens, batch=batch)
            if off:
                with adapters_off(model.hf):
                    found.append(sample(model, prompts, how))
            else:
                found.append(sample(model, prompts, how))
        for one, other in zip(*found, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-3, atol=1e-4)


def test_beside_others_an_adapter_is_that_of_float32_weights(folder: Path, tmp_path: Path) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    adapter = read_adapter(save_adapter(both(folder)[1], SHAPE, tmp_path / "adapter"))
    for steady in (False, True):
        found = []
        for weights in ("stored", "float32"):
            served = Adapters(load(str(folder), World(), weights))
            served.add("one", adapter)
            served.route([Row(np.array([1]), Sampling(max_new_tokens=1), adapter="one")], [5])
            with kept_twice(served.model.hf, 1e12 * steady, halve=steady, steady=True):
                found.append(served.layers["model.layers.0.self_attn.q_proj"](x))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_steps_of_another_base_are_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    steps = load_file(other / STEPS)
    save_file({name: step * 3 for name, step in steps.items()}, other / STEPS, metadata={"numbers": "1"})
    with pytest.raises(ModelError, match=r"is not what was rounded to 8 bits"):
        load(str(other), World(), "stored")


def test_steps_that_are_damaged_or_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    steps = load_file(other / STEPS)
    for wrong in ({name: step[1:] for name, step in steps.items()}, {"model.layers.9.mlp.up_proj": torch.ones(3)}):
        save_file({name: step.clone() for name, step in wrong.items()}, other / STEPS, metadata={"numbers": "1"})
        with pytest.raises(ModelError, match=r"is not what was rounded to 8 bits\nRound its base again"):
            load(str(other), World(), "stored")
    for damaged in (b"", (folder / STEPS).read_bytes()[:40]):
        (other / STEPS).write_bytes(damaged)
        with pytest.raises(ModelError, match=r"steps\.safetensors: damaged\nRound its base again"):
            load(str(other), World(), "stored")


def test_numbers_that_float16_does_not_hold_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    large = shutil.copytree(tiny_model_folder, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm holds numbers that float16 does not"):
        write_rounded(large, tmp_path)


@pytest.mark.parametrize(
    ("wanted", "bytes_a_number", "kept"),
    [("auto", 8.5, "float32"), ("auto", 7.5, EIGHT_BITS), ("stored", 100.0, EIGHT_BITS), ("float32", 4.5, "float32")],
)
def test_float32_is_left_where_it_would_take_over_half_of_the_memory(
    wanted: Weights, bytes_a_number: float, kept: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(stored, "available_bytes", lambda device: int(bytes_a_number * numbers))
    assert kept_as(folder, wanted, World()).value == kept
    if wanted == "auto":
        gpu = World(device=torch.device("cuda"))
        assert kept_as(folder, wanted, gpu).value == "bfloat16"  # half the bytes are enough there
        monkeypatch.setattr(stored, "available_bytes", lambda device: int(3.5 * numbers))
        assert kept_as(folder, wanted, gpu).value == EIGHT_BITS


def test_eight_bits_are_counted_for_each_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, eight = (sum(t.numel() for t in load_file(folder / "model.safetensors").values()), rounded_numbers(folder))
    room = 2 * (numbers - eight) + int(1.5 * eight)
    monkeypatch.setattr(stored, "available_bytes", lambda device: room)
    assert kept_as(folder, "auto", World()).value == EIGHT_BITS
    with pytest.raises(ModelError, match="in 8 bits, the machine has"):
        kept_as(folder, "auto", World(size=2, sharing=2))


def test_a_base_without_room_is_told_of_rounding_and_a_rounded_one_is_not(
    folder: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plain(tiny_model_folder, None, tmp_path, torch.bfloat16)
    monkeypatch.setattr(stored, "available_bytes", lambda device: 1000)
    with pytest.raises(ModelError, match=r"tunesmith round"):
        kept_as(tmp_path, "auto", World())
    with pytest.raises(ModelError, match=r"Choose a smaller base\.$"):
        kept_as(folder, "auto", World())
