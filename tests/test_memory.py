"""Memory that may be used is what the machine has, within the limits of every group that the process is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("line", "group", "limit", "use"),
    [
        ("0::/slurm/job_7/step_0/task_0", "slurm/job_7", "memory.max", "memory.current"),
        ("0::/elsewhere/pod", ".", "memory.max", "memory.current"),  # a container's own group is the root
        ("4:memory:/slurm/job_7", "memory/slurm/job_7", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_the_limit_of_a_job_is_known_wherever_its_group_lies(
    line: str, group: str, limit: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, mine = tmp_path / "cgroup", tmp_path / "mine"
    (root / group).mkdir(parents=True)
    for name, text in ((limit, "3000000"), (use, "2000000"), ("memory.stat", "inactive_file 500000\n")):
        (root / group / name).write_text(text)
    mine.write_text(f"3:cpuset:/other\n{line}\n")
    monkeypatch.setattr(memory, "_ROOT", root)
    monkeypatch.setattr(memory, "_MINE", mine)
    assert memory.available_bytes(CPU) == 3_000_000
    assert memory.free_bytes(CPU) == 1_500_000


def test_without_groups_the_machine_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_MINE", tmp_path / "none")
    assert memory.available_bytes(CPU) > 1_000_000
