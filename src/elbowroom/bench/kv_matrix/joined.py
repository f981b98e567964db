"""kv-matrix: what KV plans keep of a model at equal bytes, one claim a module, on the built-in model.

``spatten.bytes`` counts what SpAtten's public traces read. The others are measured, each in its own module. One that
raises leaves its claims without values and the error as their reason; the others are measured all the same.
"""

from __future__ import annotations

import sys
import time
import traceback

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
from elbowroom.bench.kv_matrix.part import Measure, broken
from elbowroom.bench.machine import machine_info

PARTS: tuple[tuple[Measure, tuple[Claim, ...]], ...] = (
    (spatten_bytes.measure, (spatten_bytes.CLAIM,)),
    (kvmerger_exact.measure, (kvmerger_exact.CLAIM,)),
    (think_bytes.measure, (think_bytes.BYTES, think_bytes.PACKED)),
    (kivi_axes.measure, (kivi_axes.AXES_CLAIM, kivi_axes.KEYS_CLAIM)),
    (bfp_gain.measure, (bfp_gain.GAIN_CLAIM, bfp_gain.NONE_CLAIM)),
    (scbench_turns.measure, (scbench_turns.CLAIM,)),
    (defaults.measure, (defaults.CLAIM,)),
)
"""How each part is measured, and what it claims."""


def run(options: BenchOptions) -> BenchResult:
    """Measure every part, one after the other."""
    machine = machine_info()
    rows: list[Row] = []
    claims: list[Claim] = []
    failures: list[str] = []
    for measure, claimed in PARTS:
        started = time.perf_counter()
        names = ", ".join(claim.id for claim in claimed)
        try:
            part = measure(options)
        except Exception as error:  # noqa: BLE001  hours of other parts must not be lost; the claims say what it was
            traceback.print_exc()
            part = broken(claimed, error)
            failures.append(names)
        rows += part.rows
        claims += part.claims
        sys.stderr.write(f"  {names}: {time.perf_counter() - started:.0f} s\n")
    return BenchResult(name="kv-matrix", machine=machine, rows=rows, claims=claims, failures=failures)
