"""Meter: what the operating system says this process holds; the judge of every claim about memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_OWN_STATUS = Path("/proc/self/status")


def status_bytes(pid: int, field: str) -> int:
    """Return a kB field of /proc/PID/status in bytes; 0 for a process that is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def rss_bytes() -> int:
    """Return VmRSS of this process."""
    if _OWN_STATUS.exists():
        return status_bytes(os.getpid(), "VmRSS")
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return VmHWM of this process, plus that of live children."""
    if not _OWN_STATUS.exists():
        return rss_bytes()
    children = psutil.Process().children(recursive=True)
    return status_bytes(os.getpid(), "VmHWM") + sum(status_bytes(child.pid, "VmHWM") for child in children)


def reset_peak() -> bool:
    """Set VmHWM back to VmRSS; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that this process may expect: the smaller of cgroup room and available memory.

    Args:
        cgroup: where the cgroup file system is mounted (version 2, or 1 below ``memory/``).
    """
    available = int(psutil.virtual_memory().available)
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        room = _cgroup_room(cgroup / limit, cgroup / used, cgroup / stat)
        if room is not None:
            available = min(available, room)
    return available


def _cgroup_room(limit_file: Path, used_file: Path, stat_file: Path) -> int | None:
    """Return limit minus use, not counting cached file pages as used (the kernel drops those first)."""
    try:
        limit, used = int(limit_file.read_text()), int(used_file.read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
    return max(limit - max(used - _cached_file_bytes(stat_file), 0), 0)


def _cached_file_bytes(stat_file: Path) -> int:
    try:
        fields = dict(line.split() for line in stat_file.read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0


@dataclass(slots=True)
class Meter:
    """Measures the process against a baseline; made before the model is loaded."""

    baseline_bytes: int

    @classmethod
    def start(cls) -> Meter:
        """Return a meter whose baseline is the present RSS, and start a new peak."""
        reset_peak()
        return cls(baseline_bytes=rss_bytes())

    @property
    def peak_over_baseline_bytes(self) -> int:
        """Peak RSS since ``start``, minus the baseline."""
        return max(peak_rss_bytes() - self.baseline_bytes, 0)
