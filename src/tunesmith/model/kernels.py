"""Arithmetic between matrix products: as written on a CPU, as a few compiled kernels on a GPU.

On a GPU such arithmetic takes as long as memory takes to be read and written, so what one kernel can do is not left to
six. torch.compile writes the kernels, on first use and once more for streams of another length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_gpu(work: Callable[P, R]) -> Callable[P, R]:
    """`work`, whose first argument is a tensor; compiled where that is on a GPU and there is a compiler for it."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(work) if has_triton() else work

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        return (compiled() if isinstance(first, Tensor) and first.is_cuda else work)(*args, **kwargs)

    return run
