"""What machine a result was measured on, with its peaks measured at the time of the benchmark."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import torch

from elbowroom.kernels import attention

_PROBE_BYTES = 512 * 2**20
_PROBE_SIZE = 1024
_PROBE_MS = 300
_REPEATS = 5
_ENOUGH_S = 1.0


def machine_info(probe: bool = True) -> dict[str, object]:
    """Return processor, memory, versions, load and (with ``probe``) peaks of this machine.

    Peaks are of all usable threads together, as the functions of their names measure them.
    """
    num_threads = usable_threads()
    info: dict[str, object] = {
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": num_threads,
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": attention.backend_name(),
        "load_average": os.getloadavg()[0],
    }
    if probe:
        info |= {
            "read_gb_per_s": read_gb_per_s(num_threads),
            "fma_gflop_per_s": fma_gflop_per_s(),
            "fp32_gflop_per_s": gflop_per_s(num_threads),
        }
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_threads() -> int:
    """Return the threads that this process may run at once: its CPU affinity, cut by its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def read_gb_per_s(num_threads: int) -> float:
    """Return the GB/s at which ``num_threads`` threads together read 512 MiB in order, best of up to five.

    Native threads follow several streams each. Without them numpy takes maxima (it lets go of the GIL meanwhile), which
    reads up to a quarter slower.
    """
    if attention.backend_name() == "native":
        from elbowroom import _native

        return round(_native.read_gb_per_s(_PROBE_BYTES, _REPEATS), 2)
    parts = np.array_split(np.ones(_PROBE_BYTES // 4, dtype=np.int32), num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        return round(_PROBE_BYTES / _best_seconds(lambda: list(pool.map(np.max, parts))) / 1e9, 2)


def fma_gflop_per_s() -> float | None:
    """Return the GFLOP/s of float32 multiply-adds in registers: the ceiling of all arithmetic; None without kernels."""
    if attention.backend_name() != "native":
        return None
    from elbowroom import _native

    return round(_native.fma_gflop_per_s(_PROBE_MS), 1)


def gflop_per_s(num_threads: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the GFLOP/s of a 1024 x 1024 matmul by ``num_threads`` of torch's threads, best of up to five.

    The second factor is transposed, as weights are.
    """
    a, before = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return round(2 * _PROBE_SIZE**3 / _best_seconds(lambda: a @ a.t()) / 1e9, 1)
    finally:
        torch.set_num_threads(before)


class ForeignCPU:
    """Measures, while it is entered, the share of the machine's CPU time that others than this process tree take.

    Threads that wait for each other by spinning suffer most from neighbours, so a comparison beside them is not fair.
    """

    share = 0.0

    def __enter__(self) -> Self:
        """Start."""
        self._started, self._before = time.monotonic(), _foreign_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        """Set ``share``; processes of this tree that ended meanwhile count as others."""
        passed = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        self.share = round(max(0.0, _foreign_seconds() - self._before) / passed, 3)


def _foreign_seconds() -> float:
    """Return the CPU seconds of all processes, and those taken by other machines of the host, less our tree's."""
    whole = psutil.cpu_times()
    busy = whole.user + whole.system + sum(getattr(whole, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
    ours = psutil.Process()
    times = [process.cpu_times() for process in (ours, *ours.children(recursive=True))]
    return float(busy - sum(each.user + each.system for each in times))


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest of five times; a machine that needs long is not asked again."""
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _ENOUGH_S:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
