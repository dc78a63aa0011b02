"""Whether one more worker fits into memory beside those at work, by what the runs of this folder planned.

All jobs of a server have one base, so what the largest of them planned is taken to be what the next one needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from ..errors import TunesmithError
from ..folder import RunFolder, read_json
from ..memory import free_bytes
from ..train.meter import resident_bytes
from .jobs import Store, list_jobs
from .locks import worker_of

LOOKED_AT = 32  # jobs, the newest


def has_room(store: Store, at_work: Sequence[str], device: torch.device) -> bool:
    """Whether another may start. One alone always may; beside one, only when some job has said what it needs."""
    if not at_work:
        return True
    planned = {job.id: _planned_bytes(store, job.id) for job in list_jobs(store)[-LOOKED_AT:]}
    largest = max(planned.values(), default=0.0)
    if not largest:
        return False
    growing = (max(0.0, (planned.get(name) or largest) - _held_bytes(store, name, device)) for name in at_work)
    return fits(largest, growing, free_bytes(device))


def fits(need: float, growing: Iterable[float], free: float) -> bool:
    """Whether `need` bytes are left of the free ones when those at work have grown to what they planned."""
    return need + sum(growing) <= free


def _planned_bytes(store: Store, job: str) -> float:
    """The peak that a job's run predicts, 0 where it has not yet."""
    with suppress(TunesmithError):
        arms = read_json(RunFolder(path=store.run(job)).plan).get("arms", {}).values()
        return max((float(arm["predicted"]["peak_memory_bytes"]) for arm in arms if "predicted" in arm), default=0.0)
    return 0.0


def _held_bytes(store: Store, job: str, device: torch.device) -> int:
    """What its worker holds of that already; nobody knows it of another process's share of a GPU."""
    return resident_bytes(worker_of(store.job(job)) or 0) if device.type == "cpu" else 0
