"""Economy: adapters in the upper blocks only, and what the frozen blocks below make of each row computed once.

What comes into the first adapted block is the same in every epoch, and for a token it depends on its row's tokens up to
it alone. So it is computed in one pass over the rows, kept in a file while the update trains, and picked for whatever
stream a row is packed into; each epoch begins at the adapted blocks (Liu et al. 2021, "AutoFreeze", arXiv 2102.01386).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.counts import counts
from ..data.pack import pack
from ..errors import FolderError
from ..folder import storage_errors, write_bytes
from ..model.attention import PackedAttention
from ..model.filler import filled
from ..model.load import Model
from ..tensors import Batch, Layout
from ..train.plan import Reach
from ..types import Example
from .sft import SftSteps

ROWS_AT_ONCE = 64
PASSES_THAT_PAY = 1.5


def reach(source: SftSteps, model: Model) -> Reach:
    """Which of the run's tokens go through the head, and which through frozen lower blocks."""
    sizes, beside = source.row_tokens(), source.rehearsal.tokens_a_row
    scored = np.mean(counts(source.examples).scored) + beside
    rows = len(source.examples) if keeps_states(source, model) else math.inf
    mean = float(np.mean(sizes))
    return Reach(scored=float(scored) / mean, rows=rows, row_tokens=mean - beside)


def keeps_states(source: SftSteps, model: Model) -> bool:
    """Whether rows come often enough, and the model's forward pass can begin above the frozen blocks."""
    passes = source.steps * source.batch / len(source.examples)
    return bool(model.blocks and model.blocks.trains and model.blocks.frozen) and passes >= PASSES_THAT_PAY


class KeptStates:
    """A StepSource: the batches of another, with the states of rows that `source` has; texts beside them have none.

    The file is made at the first step, and again if it is gone when an interrupted run goes on, from the same rows in
    the same order, so that the states are the same. Each rank writes those of its rows and all read all.
    """

    def __init__(self, source: SftSteps, model: Model, folder: Path) -> None:
        assert model.blocks
        self.source, self.model, self.blocks, self.folder = source, model, model.blocks, folder
        self.steps, self.first, self.width = source.steps, model.blocks.frozen, int(model.head_weight.shape[1])
        self.places: dict[bytes, tuple[Path, int]] = {}

    def __call__(self, step: int) -> Sequence[Batch]:
        """The batches of a step, begun."""
        if not self.places:
            self._make()
        return [replace(batch, states=self._states(batch)) for batch in self.source(step)]

    @property
    def rows_a_step(self) -> float:
        """As without kept states."""
        return self.source.rows_a_step

    def row_tokens(self) -> Sequence[float]:
        """As without kept states."""
        return self.source.row_tokens()

    @property
    def told(self) -> str:
        """What is done and what it takes on the disk, in a sentence."""
        rows = self.source.examples
        return (
            f"{self.first} of {len(self.blocks.blocks)} blocks are frozen: computed once for {len(rows):,} rows and "
            f"kept while training, {self._bytes(rows) / 1e9:.2g} GB on the disk"
        )

    def forget(self) -> None:
        """Delete the files."""
        if self.source.world.leads:
            for path in self.folder.glob("states-*"):
                path.unlink()

    def _make(self) -> None:
        """Write this rank's file unless it is there, and learn where every row lies."""
        world, rows, key = self.source.world, self.source.examples, self._key()
        world.barrier()  # the first rank has tidied up by now, and will not take a file for one that a kill left half
        paths = [self.folder / f"states-{key}-{rank}.f32" for rank in range(world.size)]
        mine = paths[world.rank]
        due = self._bytes(world.share(rows))
        if not mine.is_file() or mine.stat().st_size != due:
            with storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.folder).free
            if free < due:
                what = f"the states of frozen blocks take {due / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
                fix = "Free some space and run again, or choose update: lora or fewer rows (data.rows)."
                raise FolderError(what, where=str(mine), fix=fix)
            write_bytes(mine, self._computed(world.share(rows)))
        world.barrier()
        for rank, path in enumerate(paths):
            part = rows[rank :: world.size]
            starts = accumulate((len(example.tokens) for example in part), initial=0)
            for example, (start, _) in zip(part, pairwise(starts), strict=True):
                self.places[_digest(example.tokens)] = (path, 4 * self.width * start)

    def _bytes(self, rows: Sequence[Example]) -> int:
        return 4 * self.width * int(counts(rows).tokens.sum())

    def _key(self) -> str:
        """What the states depend on: base, boundary, rows."""
        digest = hashlib.blake2b(f"{self.model.vocabulary.folder} {self.first}".encode(), digest_size=8)
        for example in self.source.examples:
            digest.update(_digest(example.tokens))
        return digest.hexdigest()

    def _computed(self, rows: Sequence[Example]) -> Iterator[bytes]:
        """The states of each row, one after the other."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            found: dict[bytes, Tensor] = {}
            for batch in pack(some, budget_tokens=self.source.budget_tokens):
                here = filled(batch.to(self.model.device))
                attend = PackedAttention(here.layout)
                states = self.blocks.below(self.first, here.tokens, here.positions, attend).float().cpu()
                for path in paths_of(batch.layout):
                    found[_digest(batch.tokens[path].numpy())] = states[path]
            for example in some:
                yield found[_digest(example.tokens)].numpy().tobytes()

    def _states(self, batch: Batch) -> Float[Tensor, "T D"] | None:
        """The states of a stream's tokens; None where a row of it is not kept."""
        states = torch.empty(len(batch.tokens), self.width)
        for path in paths_of(batch.layout):
            place = self.places.get(_digest(batch.tokens[path].numpy()))
            if place is None:
                return None
            with storage_errors(place[0]):
                row = np.fromfile(place[0], np.float32, len(path) * self.width, offset=place[1])
            states[path] = torch.from_numpy(row.reshape(len(path), self.width))
        return states


def paths_of(layout: Layout) -> list[Int[Tensor, "T"]]:
    """Where the tokens of each row stand in the stream: those of all it continues, oldest first, and its own."""
    spans = [torch.arange(start, start + length) for start, length in zip(layout.starts, layout.lengths, strict=True)]
    leaves = sorted(set(range(len(spans))) - set(layout.parents))
    return [torch.cat([spans[segment] for segment in (*layout.ancestors(leaf), leaf)]) for leaf in leaves]


def _digest(tokens: Int[np.ndarray, "T"]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, np.int64).tobytes(), digest_size=16).digest()
