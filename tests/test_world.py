"""What torchrun's environment makes of a process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from tunesmith.world import world_from_env


def test_other_ranks_wait_as_long_as_the_first_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append(timeout))
    assert world_from_env().size == 2
    assert asked[0] >= timedelta(days=1)
