"""What the operating system says of the processor."""

from __future__ import annotations

from pathlib import Path


def cpu_fact(key: str) -> str:
    """The first line `key` of /proc/cpuinfo, as `model name` or `vendor_id`; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
