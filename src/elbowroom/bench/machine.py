"""What machine a result was measured on, with its peaks measured at the time of the benchmark."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from elbowroom.kernels import attention

_PROBE_BYTES = 256 * 2**20
_PROBE_SIZE = 1024
_REPEATS = 5


def machine_info(probe: bool = True) -> dict[str, object]:
    """Return processor, memory, versions, load and (with ``probe``) peaks of this machine.

    Peaks: GB/s of a sequential read by one thread, and float32 GFLOP/s of a 1024 x 1024 matmul by all of torch's
    threads; both the best of five.
    """
    info: dict[str, object] = {
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": attention.backend_name(),
        "load_average": os.getloadavg()[0],
    }
    if probe:
        info |= {"read_gb_per_s": _read_bandwidth(), "fp32_gflop_per_s": _matmul_rate()}
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _best_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _read_bandwidth() -> float:
    data = np.ones(_PROBE_BYTES // 8, dtype=np.int64)
    return round(_PROBE_BYTES / _best_seconds(data.max) / 1e9, 2)


def _matmul_rate() -> float:
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE)
    return round(2 * _PROBE_SIZE**3 / _best_seconds(lambda: a @ a) / 1e9, 1)
