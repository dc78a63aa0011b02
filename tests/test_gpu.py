"""On a GPU, in bfloat16: what it computes is what a CPU computes in float32, but for rounding. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.data.pack import pack
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.attention import PackedAttention
from tunesmith.model.flash import flash_attention, flashes, meetings
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora
from tunesmith.model.merge import write_plain, write_rounded
from tunesmith.model.sample import Sampling, sample
from tunesmith.model.score import score
from tunesmith.model.stored import EIGHT_BITS
from tunesmith.recipe import Weights
from tunesmith.tensors import Layout
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization, adamw
from tunesmith.types import Example
from tunesmith.world import World

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"), pytest.mark.slow]
GPU = World(device=torch.device("cuda"))
LAYOUTS = [
    Layout(lengths=(40, 7, 1, 130), parents=(-1, -1, -1, -1)),
    Layout(lengths=(1024, 1024), parents=(-1, -1)),
    Layout(lengths=(60, 4, 50, 4, 20), parents=(-1, 0, -1, 2, 0)),
    Layout(lengths=(40, 30, 50, 2, 60, 2), parents=(-1, 0, 1, 1, 0, 4)),
]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its numbers cut to bfloat16."""
    target = tmp_path_factory.mktemp("bfloat16")
    write_plain(tiny_model_folder, None, target, torch.bfloat16)
    return target


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative to the length of what is expected."""
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


def both(folder: Path, update: str, weights: Weights = "auto") -> list[Model]:
    """On the CPU and on the GPU, ready to be trained."""
    models = [load(str(folder), World(), "float32"), load(str(folder), GPU, weights)]
    for model in models:
        if update == "lora":
            attach_lora(model.hf, LoraShape(rank=4, alpha=8.0), head=model.head)
            for name, parameter in trainable(model.hf).items():  # B begins at 0: nothing would reach A
                if name.endswith("lora_b"):
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return models


def test_the_kernels_attend_as_copies_do() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for layout in LAYOUTS:
        tokens = sum(layout.lengths)
        inputs = [
            torch.randn(heads, tokens, 64, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
            for heads in (8, 2, 2)
        ]
        assert flashes(inputs[0])
        wide = [part.detach().float().requires_grad_() for part in inputs]
        found = flash_attention(*inputs, 0.125, meetings(layout, GPU.device))
        expected = PackedAttention(layout)._with_copies(*wide, 0.125, None, None)
        assert apart(found, expected) < 1e-2
        slope = torch.randn(found.shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        ours = torch.autograd.grad(found, inputs, slope)
        theirs = torch.autograd.grad(expected, wide, slope.float())
        assert max(map(apart, ours, theirs)) < 1e-2


@pytest.mark.parametrize("update", ["lora", "full"])
def test_losses_and_gradients_are_those_of_a_cpu(update: str, folder: Path, tiny_examples: list[Example]) -> None:
    found = []
    for model in both(folder, update):
        assert model.packs
        assert model.blocks
        assert model.blocks.trains
        for batch in pack(tiny_examples[:40], budget_tokens=500):
            there = batch.to(model.device)
            loss = CrossEntropy()(score(model, there), there).sum
            loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in trainable(model.hf).items()}))
    (cpu, cpu_grads), (gpu, gpu_grads) = found
    assert float(gpu) == pytest.approx(float(cpu), rel=1e-2)
    assert max(apart(gpu_grads[name], grad) for name, grad in cpu_grads.items()) < 6e-2  # type: ignore[arg-type]


def test_a_base_in_eight_bits_is_that_of_a_cpu(
    tiny_model_folder: Path, tiny_examples: list[Example], tmp_path: Path
) -> None:
    write_rounded(tiny_model_folder, tmp_path)
    cpu, gpu = both(tmp_path, "lora", "stored")
    assert gpu.weights.value == EIGHT_BITS
    assert {p.dtype for p in gpu.hf.parameters()} == {torch.int8, torch.bfloat16, torch.float32}
    found = []
    for model in (cpu, gpu):
        batch = pack(tiny_examples[:40], budget_tokens=2000)[0].to(model.device)
        loss = CrossEntropy()(score(model, batch), batch).sum
        loss.backward()
        found.append((float(loss.detach()), {name: p.grad for name, p in trainable(model.hf).items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-2)
    assert max(apart(found[1][1][name], grad) for name, grad in found[0][1].items()) < 6e-2  # type: ignore[arg-type]
    prompts = [example.tokens[:12] for example in tiny_examples[:4]]
    assert len(sample(gpu, prompts, Sampling(max_new_tokens=8))) == 4


@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_loss_curve_is_that_of_a_cpu(update: str, folder: Path, tiny_examples: list[Example], tmp_path: Path) -> None:
    curves = []
    for model in both(folder, update):
        world = GPU if model.device.type == "cuda" else World()
        source = SftSteps(tiny_examples, batch=16, epochs=3.0, budget_tokens=400, world=world, max_steps=20)
        how = Optimization(learning_rate=5e-3 if update == "lora" else 1e-3, schedule="cosine")
        done = list(fit(model, source, CrossEntropy(), how, tmp_path / model.device.type, world))
        curves.append([step.loss for step in done])
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
    assert curves[1][-1] < 0.95 * curves[1][0]


def test_the_compiled_optimizer_moves_weights_as_the_plain_one() -> None:
    start = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [torch.nn.Parameter(start.clone().to(device)) for device in ("cpu", "cuda")]
    optimizers = [adamw([weight], Optimization(learning_rate=1e-3, weight_decay=0.1)) for weight in weights]
    for step in range(10):
        gradient = torch.randn(300, 70, generator=torch.Generator().manual_seed(step)).bfloat16()
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.to(weight.device)
            optimizer.step()
    numbers = [
        ((w.detach().view(torch.int16).to(torch.int32) << 16) + o.state[w]["low"]).view(torch.float32).cpu()
        for w, o in zip(weights, optimizers, strict=True)
    ]
    torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 20])
def test_recorded_steps_draw_what_single_ones_draw(
    prefix: int, folder: Path, tiny_examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(folder), GPU)
    shared = np.arange(30, 30 + prefix)
    prompts = [np.concatenate([shared, example.tokens[: 5 + n % 11]]) for n, example in enumerate(tiny_examples[:40])]
    how = Sampling(max_new_tokens=40)
    recorded = sample(model, prompts, how)
    monkeypatch.setattr("tunesmith.model.sample.records", lambda model: False)
    single = sample(model, prompts, how)
    same = 0
    for ours, theirs in zip(recorded, single, strict=True):
        length = min(len(ours.tokens), len(theirs.tokens))
        differ = np.flatnonzero(ours.tokens[:length] != theirs.tokens[:length])
        same += not len(differ)
        until = int(differ[0]) + 1 if len(differ) else length  # two tokens as likely: after it, another text
        np.testing.assert_allclose(ours.log_probs[:until], theirs.log_probs[:until], atol=5e-2)
    assert same >= 0.8 * len(prompts)
