"""A decoding step on a GPU, recorded once and replayed: hundreds of small kernels with one launch.

A CUDA graph repeats kernels on the same addresses, so tokens and places are written where it reads them. One recording
serves so many rows and so long a past; both are rounded up, and rows that are too many write where no row is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .cache import Cache, Decode
from .few_rows import wide_answer
from .load import Model

PAST_TOKENS = 256  # a recording looks back over a multiple of these
FEWEST_ROWS = 8
KNOWN_TURNS = {"default", "linear", "llama3", "yarn"}  # the others ask the device how long a row is


class Recording(NamedTuple):
    """What is replayed, where it reads, and where it leaves the logits."""

    graph: torch.cuda.CUDAGraph
    tokens: Int[Tensor, "N"]
    places: Int[Tensor, "N"]
    logits: Float[Tensor, "N V"]


class Recordings:
    """Decoding steps over a cache whose prefix is `shared` tokens long."""

    def __init__(self, model: Model, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.made: dict[tuple[int, int, int], Recording] = {}
        self.slots = torch.arange(cache.rows, device=model.device)  # recordings read it where it lies
        self.pool = torch.cuda.graph_pool_handle()

    def logits(self, tokens: Int[np.ndarray, "N"], places: Int[np.ndarray, "N"], shared: int) -> Float[Tensor, "N V"]:
        """What follows the tokens, the n-th in slot n at place n after the prefix; valid until the next call."""
        rows, past = self._rows(len(tokens)), -(-(int(places.max()) + 1) // PAST_TOKENS) * PAST_TOKENS
        key = (rows, min(past, self.cache.capacity), self.cache.capacity)
        made = self.made.get(key)
        if made is None:
            made = self.made[key] = self._record(tokens, places, shared, rows, key[1])
        else:
            self._write(made.tokens, tokens)
            self._write(made.places, places)
            made.graph.replay()
        return made.logits[: len(tokens)]

    def _rows(self, count: int) -> int:
        """The smallest half of a half ... of all slots that holds so many."""
        rows = self.cache.rows
        while rows // 2 >= max(count, FEWEST_ROWS):
            rows //= 2
        return rows

    def _write(self, target: Tensor, numbers: np.ndarray) -> None:
        target[: len(numbers)].copy_(torch.from_numpy(numbers), non_blocking=True)
        target[len(numbers) :].zero_()

    def _record(self, tokens: np.ndarray, places: np.ndarray, shared: int, rows: int, past: int) -> Recording:
        assert self.model.blocks
        device, blocks = self.model.device, self.model.blocks
        here, at = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self._write(here, tokens)
        self._write(at, places)

        def step() -> Tensor:
            attend = Decode(self.cache, self.slots[:rows], at, past)
            return wide_answer(blocks.answer(here, at + shared, attend), self.model.head)

        aside = torch.cuda.Stream()  # what libraries set up on first use may not be recorded
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            step()
            torch.cuda.synchronize()
            graph.capture_begin(pool=self.pool)
            logits = step()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)
        graph.replay()
        return Recording(graph, here, at, logits)


def records(model: Model) -> bool:
    """Whether steps of this model can be recorded."""
    turn = (model.hf.config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    return model.device.type == "cuda" and model.blocks is not None and turn in KNOWN_TURNS
