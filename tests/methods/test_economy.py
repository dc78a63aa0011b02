"""Economy: what frozen blocks make of a row is computed once, and training from it is the same training."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.errors import FolderError
from tunesmith.folder import write_bytes
from tunesmith.methods.economy import KeptStates, keeps_states, paths_of, reach
from tunesmith.methods.rehearsal import Rehearsal, own_text
from tunesmith.methods.sft import CrossEntropy, SftSteps
from tunesmith.model.attention import PackedAttention
from tunesmith.model.load import Model, load
from tunesmith.model.lora import LoraShape, attach_lora, lora_layers
from tunesmith.model.score import score
from tunesmith.tensors import Batch, Layout
from tunesmith.train.checkpoint import trainable
from tunesmith.train.fit import fit
from tunesmith.train.optim import Optimization
from tunesmith.train.plan import flops
from tunesmith.types import Example
from tunesmith.world import World


def upper(model: Model) -> Model:
    """The tiny model with adapters that change something in the second of its two blocks."""
    attach_lora(model.hf, LoraShape(rank=4, alpha=8.0, lowest=1), head=model.head)
    with torch.no_grad():
        for layer in lora_layers(model.hf).values():
            layer.lora_b.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def adapted(fresh_model: Model) -> Model:
    return upper(fresh_model)


def steps(rows: Sequence[Example], epochs: float = 3.0, texts: Sequence[Example] = ()) -> SftSteps:
    rehearsal = Rehearsal(texts=texts, strength=0.5 if texts else 0.0)
    return SftSteps(rows, rehearsal=rehearsal, batch=16, epochs=epochs, budget_tokens=300, world=World())


def gradients(model: Model, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = CrossEntropy()(score(model, batch), batch).sum
    loss.backward()
    found = {name: parameter.grad for name, parameter in trainable(model.hf).items()}
    for parameter in model.hf.parameters():
        parameter.grad = None
    return float(loss.detach()), {name: slope for name, slope in found.items() if slope is not None}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 6)), min_size=1, max_size=7))
def test_a_rows_path_is_every_token_that_it_continues_and_its_own(drawn: list[tuple[int, int]]) -> None:
    layout = Layout(
        lengths=tuple(length for length, _ in drawn),
        parents=tuple(min(parent, place - 1) for place, (_, parent) in enumerate(drawn)),
    )
    expected = []
    for segment in range(len(drawn)):
        if segment not in layout.parents:
            path: list[int] = []
            while segment >= 0:
                path = [layout.starts[segment] + place for place in range(layout.lengths[segment])] + path
                segment = layout.parents[segment]
            expected.append(path)
    assert [path.tolist() for path in paths_of(layout)] == expected


def test_kept_states_are_those_of_each_row_alone(adapted: Model, tiny_examples: list[Example], tmp_path: Path) -> None:
    rows = tiny_examples[:40]
    kept, alone = KeptStates(steps(rows), adapted, tmp_path), {example.id: example.tokens for example in rows}
    seen = set()
    for step in (0, 3, 4):
        for batch in kept(step):
            assert batch.states is not None
            for path in paths_of(batch.layout):
                name = next(one for one in batch.ids if alone[one].tolist() == batch.tokens[path].tolist())
                tokens = torch.from_numpy(alone[name])
                attend = PackedAttention(Layout(lengths=(len(tokens),), parents=(-1,)))
                out = adapted.hf(tokens[None], output_hidden_states=True, attend=attend)
                torch.testing.assert_close(batch.states[path], out.hidden_states[1][0], rtol=1e-5, atol=1e-6)
                seen.add(name)
    assert len(seen) > 30


def test_gradients_are_those_of_the_models_own_forward(
    adapted: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    for batch in KeptStates(steps(tiny_examples[:40]), adapted, tmp_path)(1):
        loss, slopes = gradients(adapted, batch)
        for other in (adapted, replace(adapted, blocks=None)):
            its_loss, its_slopes = gradients(other, replace(batch, states=None))
            assert loss == pytest.approx(its_loss, rel=1e-5)
            assert set(slopes) == set(its_slopes) == set(trainable(adapted.hf))
            for name, slope in slopes.items():
                near = 1e-4 * float(slope.abs().max())
                torch.testing.assert_close(slope, its_slopes[name], rtol=1e-4, atol=near, msg=name)


def test_training_from_kept_states_has_the_losses_of_training_without(
    tiny_model_folder: Path, tiny_examples: list[Example], tmp_path: Path
) -> None:
    texts = [own_text(np.arange(9) * 3 + n, f"rehearsal {n}") for n in range(4)]
    curves = []
    for kept in (True, False):
        model = upper(load(str(tiny_model_folder), World()))
        source = steps(tiny_examples[:40], texts=texts)
        begun = KeptStates(source, model, tmp_path / "states") if kept else source
        how = Optimization(learning_rate=0.01)
        done = list(fit(model, begun, CrossEntropy(), how, tmp_path / str(kept), World()))
        curves.append([one.loss for one in done])
    assert len(curves[0]) == 8
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0] - 0.05


def test_texts_beside_the_rows_are_computed_as_they_come(
    adapted: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    texts = [own_text(np.arange(9) * 3 + n, f"rehearsal {n}") for n in range(4)]
    batches = KeptStates(steps(tiny_examples[:40], texts=texts), adapted, tmp_path)(0)
    found = [(batch.ids[0].startswith("rehearsal"), batch.states is None) for batch in batches]
    assert set(found) == {(True, True), (False, False)}


def test_states_are_kept_only_where_rows_come_again_and_the_forward_pass_can_begin_above(
    adapted: Model, tiny_model: Model, tiny_examples: list[Example]
) -> None:
    assert keeps_states(steps(tiny_examples), adapted)
    assert not keeps_states(steps(tiny_examples, epochs=1.0), adapted)
    assert not keeps_states(steps(tiny_examples), replace(adapted, blocks=None))
    assert not keeps_states(steps(tiny_examples), tiny_model)


def test_a_torn_file_is_made_again_and_a_whole_one_is_read(
    adapted: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    def states() -> list[Tensor]:
        found = [batch.states for batch in KeptStates(steps(tiny_examples[:40]), adapted, tmp_path)(2)]
        return [state for state in found if state is not None]

    first = states()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert all(torch.equal(one, other) for one, other in zip(states(), first, strict=True))
    assert file.read_bytes() == whole
    made = file.stat().st_mtime_ns
    states()
    assert file.stat().st_mtime_ns == made


def test_other_rows_or_another_boundary_have_another_file(
    adapted: Model, fresh_model: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    source = steps(tiny_examples[:40])
    kept = KeptStates(source, adapted, tmp_path)
    kept(0)
    KeptStates(steps(tiny_examples[:41]), adapted, tmp_path)(0)
    assert len(list(tmp_path.iterdir())) == 2
    kept.forget()
    assert not list(tmp_path.iterdir())


def _fill(folder: str, rows: list[Example], out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        KeptStates(steps(rows), upper(load(folder, World())), out)(0)
    except FolderError as error:
        (out / "said").write_text(str(error))


def test_a_full_disk_is_told_in_words(tiny_model_folder: Path, tiny_examples: list[Example], tmp_path: Path) -> None:
    child = get_context("spawn").Process(target=_fill, args=(str(tiny_model_folder), tiny_examples, tmp_path))
    child.start()
    child.join()
    assert "the disk is full" in (tmp_path / "said").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_useful_flops_count_frozen_blocks_forward_and_once_a_row(adapted: Model, tiny_examples: list[Example]) -> None:
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert adapted.lower_parameters == block
    rows = tiny_examples[:40]
    tokens = sum(len(example.tokens) for example in rows)
    scored = sum(int((example.weights > 0).sum()) for example in rows)
    source = steps(rows, epochs=4.0)
    found = flops(adapted, "economy", source.row_tokens(), 160, reach(source, adapted))
    assert found == pytest.approx(2 * block * tokens + 4 * 4 * (block * tokens + adapted.head_weight.numel() * scored))


def _a_rank(rank: int, folder: str, rows: list[Example], out: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{out}/meet", rank=rank, world_size=2)
    world = World(rank=rank, size=2)
    source = SftSteps(rows, batch=16, epochs=3.0, budget_tokens=300, world=world)
    kept = KeptStates(source, upper(load(folder, world)), out / "states")
    for number, batch in enumerate(kept(1)):
        assert batch.states is not None
        write_bytes(out / f"{rank}-{number}", batch.states.numpy().tobytes())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_computing_and_each_has_the_states_of_its_rows(
    tiny_model_folder: Path, adapted: Model, tiny_examples: list[Example], tmp_path: Path
) -> None:
    rows, start = tiny_examples[:40], get_context("spawn").Process
    ranks = [start(target=_a_rank, args=(rank, str(tiny_model_folder), rows, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(list((tmp_path / "states").iterdir())) == 2
    for rank in range(2):
        source = SftSteps(rows, batch=16, epochs=3.0, budget_tokens=300, world=World(rank=rank, size=2))
        for number, batch in enumerate(source(1)):
            whole = PackedAttention(batch.layout)
            assert adapted.blocks
            expected = adapted.blocks.below(1, batch.tokens, batch.positions, whole)
            found = np.frombuffer((tmp_path / f"{rank}-{number}").read_bytes(), np.float32).reshape(expected.shape)
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
