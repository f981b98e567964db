"""kv-matrix: what KV plans keep of a model at equal bytes, one claim a module, on the built-in model.

``spatten.bytes`` counts what SpAtten's public traces read. The others are measured, each in its own module.
"""

from __future__ import annotations

import sys
import time

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.kv_matrix import (
    bfp_gain,
    defaults,
    kivi_axes,
    kvmerger_exact,
    scbench_turns,
    spatten_bytes,
    think_bytes,
)
from elbowroom.bench.kv_matrix.part import Measure
from elbowroom.bench.machine import machine_info

PARTS: tuple[Measure, ...] = (
    spatten_bytes.measure,
    kvmerger_exact.measure,
    think_bytes.measure,
    kivi_axes.measure,
    bfp_gain.measure,
    scbench_turns.measure,
    defaults.measure,
)


def run(options: BenchOptions) -> BenchResult:
    """Measure every part, one after the other."""
    machine = machine_info()
    rows: list[Row] = []
    claims: list[Claim] = []
    for measure in PARTS:
        started = time.perf_counter()
        part = measure(options)
        rows += part.rows
        claims += part.claims
        names = ", ".join(claim.id for claim in part.claims)
        sys.stderr.write(f"  {names}: {time.perf_counter() - started:.0f} s\n")
    return BenchResult(name="kv-matrix", machine=machine, rows=rows, claims=claims)
