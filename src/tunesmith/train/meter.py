"""What this process uses: resident memory now and at its peak, and the machine it runs on."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import resource
from pathlib import Path

import torch

from ..memory import available_bytes, numbers_in
from ..processor import cpu_fact

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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


def own_bytes() -> int:
    """Resident bytes now that are no pages of mapped files, which the system may drop and read again; 0 off Linux."""
    return _status("RssAnon")


def release_memory() -> None:
    """Give freed heap pages back to the system. Packed streams differ in length from step to step, so holes add up.

    Costs about half a second a gigabyte (pages are faulted in again), hence only now and then. Does nothing off glibc.
    """
    libc = ctypes.util.find_library("c")
    if libc and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(libc).malloc_trim(0)


def resident_bytes(pid: int) -> int:
    """What a process of this machine holds in memory, 0 where that cannot be told."""
    return _status("VmRSS", Path(f"/proc/{pid}/status"))


def machine(device: torch.device) -> dict[str, object]:
    """The machine in words and numbers, for plan.json and results.json."""
    cpu = cpu_fact("model name") or platform.machine()
    return {
        "cpu": cpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": available_bytes(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _status(key: str, path: Path = _STATUS) -> int:
    """A kB line of /proc/PID/status in bytes, 0 where there is none."""
    return 1024 * sum(numbers_in(path, f"{key}:"))
