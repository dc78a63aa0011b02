"""What this process uses: resident memory now and at its peak, and the machine it runs on."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_ROOT = Path("/sys/fs/cgroup")
# Limit, use and statistics of a control group, as its second and its first version name them.
_GROUP = (
    (_ROOT / "memory.max", _ROOT / "memory.current", _ROOT / "memory.stat"),
    (
        _ROOT / "memory" / "memory.limit_in_bytes",
        _ROOT / "memory" / "memory.usage_in_bytes",
        _ROOT / "memory" / "memory.stat",
    ),
)


def reset_peak_memory() -> None:
    """Start a new peak from what is in use. Where the system cannot (not Linux), it stays that of the whole process."""
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Peak resident bytes since the last reset on a CPU, the allocator's peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes(device: torch.device) -> int:
    """Resident bytes now on a CPU, allocated bytes on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give freed heap pages back to the system. Packed streams differ in length from step to step, so holes add up.

    Costs about half a second a gigabyte (pages are faulted in again), hence only now and then. Does nothing off glibc.
    """
    libc = ctypes.util.find_library("c")
    if libc and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(libc).malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that a run may use: the device's free memory, or the machine's or its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit, _, _ in _GROUP:
        limits += _numbers(limit)
    return min(limits)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses now: the device's, or the machine's within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [1024 * found for found in _numbers(Path("/proc/meminfo"), "MemAvailable:")]
    for limit, use, stat in _GROUP:
        limits, used = _numbers(limit), _numbers(use)
        if limits and used:
            cached = sum(_numbers(stat, "inactive_file"))  # files that the kernel drops when memory is wanted
            free.append(limits[0] - used[0] + cached)
    return min(free, default=available_bytes(device))


def resident_bytes(pid: int) -> int:
    """What a process of this machine holds in memory, 0 where that cannot be told."""
    return _status("VmRSS", Path(f"/proc/{pid}/status"))


def machine(device: torch.device) -> dict[str, object]:
    """The machine in words and numbers, for plan.json and results.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "cpu": _cpu_name(),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": available_bytes(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _status(key: str, path: Path = _STATUS) -> int:
    """A kB line of /proc/PID/status in bytes, 0 where there is none."""
    return 1024 * sum(_numbers(path, f"{key}:"))


def _numbers(path: Path, key: str = "") -> list[int]:
    """The number of a file that is one, or of its lines that begin with `key`; none where there is no such file."""
    with suppress(OSError):  # a process may have ended
        lines = [line.split() for line in path.read_text().splitlines()]
        words = [line[1] if key else line[0] for line in lines if line and key in ("", line[0])]
        return [int(word) for word in words if word.isdigit()]
    return []
