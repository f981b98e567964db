"""Meter: the process as the operating system sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elbowroom.memory import meter
from elbowroom.memory.malloc import limit_malloc_caching

MIB = 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RSS is read from /proc")

PEAK_SCRIPT = """
import mmap
from elbowroom.memory.meter import Meter, peak_rss_bytes, reset_peak, rss_bytes
def touch(mib):
    area = mmap.mmap(-1, mib * 2**20)
    for start in range(0, len(area), 4096):
        area[start] = 1
    return area
first = touch(160); first.close()
resets = reset_peak()
meter = Meter.start()
quiet = meter.peak_over_baseline_bytes
area = touch(64); held = rss_bytes() - meter.baseline_bytes; area.close()
print(int(resets), quiet, held, rss_bytes() - meter.baseline_bytes, meter.peak_over_baseline_bytes)
"""

MALLOC_SCRIPT = """
import ctypes, sys
from elbowroom.memory.malloc import limit_malloc_caching, trim_malloc
from elbowroom.memory.meter import rss_bytes
assert limit_malloc_caching()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
start = rss_bytes()
for size in (8 * 2**20, 2 * 2**20, 8 * 2**20):  # freeing 8 MiB would raise glibc's own thresholds
    blocks = [libc.malloc(size) for _ in range(64 * 2**20 // size)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    grown = rss_bytes() - start
    for block in blocks:
        libc.free(block)
print(grown, rss_bytes() - start)
"""


def run_script(script: str) -> list[int]:
    """Run a script in a fresh process and return the numbers it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return [int(number) for number in done.stdout.split()]


def test_peak_over_baseline_sees_memory_that_is_gone_again():
    """A 64 MiB touch shows in the peak after it was freed; what was freed before the start does not."""
    resets, quiet, held, after, peak = run_script(PEAK_SCRIPT)
    if not resets:
        pytest.skip("this system does not let a process reset VmHWM")
    tolerance = 2 * MIB
    assert quiet < tolerance
    assert abs(held - 64 * MIB) < tolerance
    assert after < tolerance
    assert abs(peak - 64 * MIB) < tolerance


def test_large_mallocs_leave_rss_when_freed():
    """With the thresholds fixed, freed blocks of megabytes go back to the operating system."""
    if not limit_malloc_caching():
        pytest.skip("no glibc")
    grown, left = run_script(MALLOC_SCRIPT)
    assert grown > 60 * MIB
    assert left < 2 * MIB


def test_peak_includes_live_children():
    """The VmHWM of a child process counts while it lives."""
    script = (
        "import mmap; m = mmap.mmap(-1, 64 * 2**20); m.write(b'1' * (64 * 2**20)); print('up', flush=True); input()"
    )
    before = meter.peak_rss_bytes()
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert meter.peak_rss_bytes() - before > 60 * MIB
        child.communicate(b"\n")


def test_vanished_process_counts_nothing():
    """A child that ends while it is read counts as zero bytes."""
    assert meter.status_bytes(2**22 + 1, "VmHWM") == 0


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_bounded_by_the_cgroup(tmp_path: Path, version: int):
    """The cgroup's room counts when smaller, and cached file pages do not use it up."""
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{10 * MIB}\n")
    (folder / names[1]).write_text(f"{7 * MIB}\n")
    assert meter.available_bytes(tmp_path) == 3 * MIB
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {2 * MIB}\n")
    assert meter.available_bytes(tmp_path) == 5 * MIB
    (folder / names[1]).write_text(f"{20 * MIB}\n")
    assert meter.available_bytes(tmp_path) == 0


def test_cgroup_without_a_bound_leaves_what_the_system_has(tmp_path: Path):
    """A bound of max and a missing cgroup mean the available memory of the machine."""
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert meter.available_bytes(tmp_path) > 16 * MIB
    assert meter.available_bytes(tmp_path / "absent") > 16 * MIB
