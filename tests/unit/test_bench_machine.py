"""The probes of a machine: rates are positive, and CPU time of others is told from our own."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from elbowroom.bench import machine


def test_reading_memory_and_multiplying_have_rates(monkeypatch):
    monkeypatch.setattr(machine, "_PROBE_BYTES", 2**22)
    monkeypatch.setattr(machine, "_PROBE_SIZE", 64)
    assert machine.read_gb_per_s(2) > 0
    assert machine.gflop_per_s(1) > 0
    assert (machine.fma_gflop_per_s() is None) == (machine.attention.backend_name() != "native")


def test_a_slow_probe_is_not_repeated():
    calls: list[int] = []
    assert machine._best_seconds(lambda: calls.append(time.sleep(0.4) or 1)) == pytest.approx(0.4, abs=0.2)
    assert len(calls) == 3


def test_our_own_work_is_not_foreign():
    """Beside what others do right now, half a second of our own child's work must not count."""
    code = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        before = machine._foreign_seconds()
        busy = machine.psutil.cpu_times()
        while sum(machine.psutil.Process(child.pid).cpu_times()[:2]) < 0.5:
            time.sleep(0.02)
        after = machine.psutil.cpu_times()
        foreign = machine._foreign_seconds() - before
        child.stdin.close()
    whole = sum(getattr(after, name) - getattr(busy, name) for name in ("user", "nice", "system"))
    assert foreign < whole - 0.3
