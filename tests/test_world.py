"""What torchrun's environment makes of a process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tunesmith.world import world_from_env


def test_other_ranks_wait_as_long_as_the_first_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append(timeout))
    assert world_from_env().size == 2
    assert asked[0] >= timedelta(days=1)


def test_ranks_of_one_machine_share_its_memory_and_those_of_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world_from_env().sharing == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_from_env().sharing == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert world_from_env().sharing == 2
