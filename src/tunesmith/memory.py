"""Memory that may be used: a device's, or the machine's within the limit of its control group."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

_ROOT, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, use and statistics of a control group, as its first and its second version name them.
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
_SECOND = ("memory.max", "memory.current", "memory.stat")


def available_bytes(device: torch.device) -> int:
    """Memory that a run may use: what others leave of the device's, or the machine's or its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit, _, _ in _groups():
        limits += numbers_in(limit)
    return min(limits)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses now: the device's, or the machine's within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [1024 * found for found in numbers_in(Path("/proc/meminfo"), "MemAvailable:")]
    for limit, use, stat in _groups():
        limits, used = numbers_in(limit), numbers_in(use)
        if limits and used:
            cached = sum(numbers_in(stat, "inactive_file"))  # files that the kernel drops when memory is wanted
            free.append(limits[0] - used[0] + cached)
    return min(free, default=available_bytes(device))


def _groups() -> list[list[Path]]:
    """Limit, use and statistics of this process's control groups and of those around them (a job of Slurm or systemd).

    A container sees its own group as the root, and may know it by a name that means something outside only.
    """
    lines, found = ["0::/", "0:memory:/"], dict[Path, list[Path]]()
    with suppress(OSError):
        lines += _MINE.read_text().splitlines()
    for _, kinds, name in (line.split(":", 2) for line in lines):
        if kinds and "memory" not in kinds.split(","):
            continue
        root, files = (_ROOT / "memory", _FIRST) if kinds else (_ROOT, _SECOND)
        own = root / name.lstrip("/")
        inside = [group for group in (own, *own.parents) if group.is_relative_to(root)]
        found |= {group: [group / file for file in files] for group in inside}
    return list(found.values())


def numbers_in(path: Path, key: str = "") -> list[int]:
    """The number of a file that is one, or of its lines that begin with `key`; none where there is no such file."""
    with suppress(OSError):  # a process may have ended
        lines = [line.split() for line in path.read_text().splitlines()]
        words = [line[1] if key else line[0] for line in lines if line and key in ("", line[0])]
        return [int(word) for word in words if word.isdigit()]
    return []
