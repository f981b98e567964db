"""The peaks that speeds are compared with: what they use, and bounds that hold on a busy machine."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from types import ModuleType

import pytest
from tests.support.native import instructions

from elbowroom.memory.meter import rss_bytes

MIB = 2**20


@pytest.fixture
def native() -> ModuleType:
    if importlib.util.find_spec("elbowroom._native") is None:
        pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)")
    return importlib.import_module("elbowroom._native")


def fma_rate(num_threads: int) -> float:
    """The rate in a process of its own, because the pool is made once."""
    code = "from elbowroom import _native; print(_native.fma_gflop_per_s(200))"
    environment = os.environ | {"ELBOWROOM_THREADS": str(num_threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    return float(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)


def test_reading_memory_has_a_rate_and_gives_the_buffer_back(native: ModuleType) -> None:
    native.read_gb_per_s(MIB, 1)  # the pool and its scratch
    before = rss_bytes()
    rate = native.read_gb_per_s(128 * MIB + 5, 2)

    assert 0.05 < rate < 1e5
    assert rss_bytes() - before < 32 * MIB


def test_a_buffer_in_the_cache_is_read_faster_than_memory(native: ModuleType) -> None:
    assert native.read_gb_per_s(native.num_threads() * 256 * 1024, 200) > native.read_gb_per_s(256 * MIB, 1)


def test_wider_instructions_multiply_faster(native: ModuleType) -> None:
    if native.supported_isas()[-1] == "baseline":
        pytest.skip("this CPU or build has only the baseline")
    rates = {}
    for name in ("baseline", native.supported_isas()[-1]):
        with instructions(name):
            rates[name] = native.fma_gflop_per_s(50)

    baseline, best = rates.values()
    assert 0.1 < baseline < best
    assert math.isfinite(best)


def test_more_threads_do_not_multiply_more_slowly(native: ModuleType) -> None:
    if native.num_threads() == 1:
        pytest.skip("this process may use one thread only")
    assert fma_rate(native.num_threads()) > 0.6 * fma_rate(1)


def test_peaks_over_nothing_are_refused(native: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        native.read_gb_per_s(0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        native.read_gb_per_s(MIB, 0)
    with pytest.raises(ValueError, match="at least 1"):
        native.fma_gflop_per_s(0)
    with pytest.raises(MemoryError):
        native.read_gb_per_s(2**60, 1)
