"""Several adapters on one base: each row gets its own, with the bits that it would get alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.adapters import load_adapter, save_adapter
from tunesmith.model.cache import Cache, Decode
from tunesmith.model.few_rows import steady_answer
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.many import Adapters
from tunesmith.model.peft_layout import Adapter, read_adapter
from tunesmith.model.sample import Live, Row, Sampling, stopped
from tunesmith.model.steady import SteadyDecode
from tunesmith.world import World

NAMES = ["", "a", "b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    """Two random adapters of the tiny model, the second in its upper block only."""
    made = {}
    draw = torch.Generator().manual_seed(0)
    for name, rank, lowest in (("a", 4, 0), ("b", 6, 1)):
        model = load(str(tiny_model_folder), World())
        shape = LoraShape(rank=rank, alpha=3.0 * rank, seed=rank, lowest=lowest)
        attach_lora(model.hf, shape, head=model.head)
        with torch.no_grad():
            for layer in lora_layers(model.hf).values():
                layer.lora_b.normal_(0.0, 0.3, generator=draw)
        made[name] = save_adapter(model, shape, tmp_path_factory.mktemp("adapters") / name)
    return made


@pytest.fixture(scope="module")
def shared(tiny_model_folder: Path, folders: dict[str, Path]) -> Adapters:
    """Both on one base."""
    adapters = Adapters(load(str(tiny_model_folder), World()))
    for name, folder in folders.items():
        adapters.add(name, read_adapter(folder))
    return adapters


def row(number: int, adapter: str, temperature: float = 0.0) -> Row:
    draw = np.random.default_rng(number)
    how = Sampling(max_new_tokens=6 + number % 9, temperature=temperature, seed=number)
    return Row(draw.integers(3, 250, int(draw.integers(1, 160))), how, 0, adapter, 3)


def answered(
    model: Model, rows: Sequence[Row], slots: int, adapters: Adapters | None = None, *, compiled: bool = True
) -> list[Row]:
    """All rows, as many side by side as there are slots."""
    route = {"route": adapters.route} if adapters else {}
    steady = {
        "decode": SteadyDecode,
        "multiply": steady_answer,
        "guesses": False,
        "compiled_keys": math.inf if compiled else 0,
    }
    live, waiting = Live(model, slots, 128, **route, **steady), list(rows)
    while waiting or live.rows:
        count = min(live.free, len(waiting))
        drawn = live.admit([waiting.pop(0) for _ in range(count)]) if count else live.advance()
        for one in drawn:
            if stopped(one, model):
                live.leave(one)
    return list(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_an_adapter_are_answered_as_by_the_model_that_has_it_alone(
    name: str, shared: Adapters, folders: dict[str, Path], tiny_model_folder: Path
) -> None:
    own = load(str(tiny_model_folder), World())
    if name:
        load_adapter(own, folders[name])
    mixed = answered(shared.model, [row(n, NAMES[n % 3]) for n in range(12)], 5, shared)
    alone = answered(own, [row(n, name) for n in range(12)], 5)
    for n in range(NAMES.index(name), 12, 3):
        assert mixed[n].tokens == alone[n].tokens
        np.testing.assert_allclose(mixed[n].log_probs, alone[n].log_probs, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [2, 3, 16])
def test_a_rows_bits_do_not_depend_on_its_company(
    slots: int, temperature: float, compiled: bool, shared: Adapters
) -> None:
    rows = [[row(n, NAMES[n % 3], temperature) for n in range(14)] for _ in range(2)]
    alone = [answered(shared.model, [one], 1, shared, compiled=compiled)[0] for one in rows[0]]
    crowd = answered(shared.model, rows[1], slots, shared, compiled=compiled)
    for one, other in zip(alone, crowd, strict=True):
        assert (one.tokens, one.log_probs, one.rivals) == (other.tokens, other.log_probs, other.rivals)


def test_a_removed_adapter_is_refused_not_replaced_by_the_base(
    tiny_model_folder: Path, folders: dict[str, Path]
) -> None:
    adapters = Adapters(load(str(tiny_model_folder), World()))
    adapters.add("a", read_adapter(folders["a"]))
    adapters.remove("a")
    with pytest.raises(KeyError, match="a"):
        adapters.route([row(0, "a")], [1])
    assert not any(layer.low_rank for layer in adapters.layers.values())


def test_an_adapter_of_the_output_layer_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = load(str(tiny_model_folder), World())
    pairs = {"lm_head": (torch.zeros(2, 64), torch.zeros(len(model.head_weight), 2))}
    foreign = Adapter(shape=LoraShape(rank=2, alpha=2.0, target=("lm_head",)), pairs=pairs, folder=tmp_path)
    with pytest.raises(ModelError, match="output layer"):
        Adapters(model).add("head", foreign)


def test_an_adapter_with_numbers_that_are_none_is_refused(folders: dict[str, Path], tiny_model_folder: Path) -> None:
    broken = read_adapter(folders["a"])
    next(iter(broken.pairs.values()))[1][0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        Adapters(load(str(tiny_model_folder), World())).add("a", broken)


# Attention in blocks


def attended(decode: type, lengths: list[int], order: list[int], window: int | None = None) -> Tensor:
    """Rows `order` of a fixed random cache, of these lengths, attend with their newest token: [B heads width]."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(9, 2, 500, 16, generator=draw) for _ in range(2))
    query = torch.randn(9, 4, 16, generator=draw)
    cache = Cache(9, 512)
    for into, of in zip(cache.layer(0, keys[0, :, :1]), (keys, values), strict=True):
        for place, (one, length) in enumerate(zip(order, lengths, strict=True)):
            into[place, :, :length] = of[one, :, :length]
    new = [torch.stack([of[one, :, n] for one, n in zip(order, lengths, strict=True)], 1) for of in (keys, values)]
    attend = decode(cache, torch.arange(len(lengths)), torch.tensor(lengths))
    return attend(0, query[order].transpose(0, 1), *new, 0.25, window).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 40, 200])
def test_attention_in_blocks_is_attention(window: int | None) -> None:
    lengths = [1, 60, 127, 128, 129, 300]
    found = attended(SteadyDecode, lengths, list(range(6)), window)
    torch.testing.assert_close(found, attended(Decode, lengths, list(range(6)), window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 31, 127, 128, 200, 400])
def test_attention_in_blocks_has_the_same_bits_beside_rows_of_any_length(length: int) -> None:
    alone = attended(SteadyDecode, [length], [0])[0]
    for others in ([1], [499], [3, 90, 300], [200] * 8):
        place = len(others) // 2
        order, lengths = list(range(1, len(others) + 1)), list(others)
        order.insert(place, 0)
        lengths.insert(place, length)
        assert torch.equal(attended(SteadyDecode, lengths, order)[place], alone)
