"""overhead: where the microseconds of a step go, what the scheduler takes, and how long a cold start lasts.

The built-in model, so small that everything around it shows. Steps: 1, 8 and 64 streams decode in a fresh process whose
engine is timed part by part. Cold start: ``elbowroom run`` with one new token, timed from outside, and by part in a
process that runs the same command with hooks. Medians; the hooks themselves take about a microsecond each.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.child import run_child
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import MedianInterval

BATCHES = (1, 8, 64)
TARGET_MS = 0.5
COLD_ARGUMENTS = ("run", "--raw", "--max-tokens", "1", "import ")
NUM_COLD = 5


def run(options: BenchOptions) -> BenchResult:
    """Measure every batch and five cold starts (quick: few tokens, one start)."""
    machine = machine_info()
    rows: list[Row] = []
    steps: list[dict[str, float]] = []
    for batch in BATCHES:
        spec = {"batch": batch, "prompt_tokens": 8, "new_tokens": 24 if options.quick else 192, "seed": options.seed}
        steps = run_child(spec, module="elbowroom.bench.overhead_child")["steps"]
        rows.append(_step_row(batch, steps))
    claim = _claim(steps)  # the last batch is the largest
    rows += [_cold_row(1 if options.quick else NUM_COLD)]
    return BenchResult(name="overhead", machine=machine, rows=rows, claims=[claim])


def _step_row(batch: int, steps: Sequence[dict[str, float]]) -> Row:
    parts = {
        f"{part}_us": 1e6 * statistics.median(step[part] for step in steps) for part in (steps[0] if steps else ())
    }
    return {"batch": batch, "num_steps": len(steps)} | parts


def _claim(steps: Sequence[dict[str, float]]) -> Claim:
    unit = f"ms of schedule and update in a step of {BATCHES[-1]} decodes, median"
    if not steps:
        return Claim(
            id="overhead.scheduler_ms",
            value=None,
            op="<=",
            target=TARGET_MS,
            unit=unit,
            num_runs=0,
            reason=f"no step had {BATCHES[-1]} decodes",
        )
    spent = MedianInterval.of([1e3 * (step["schedule"] + step["update"]) for step in steps])
    return Claim(
        id="overhead.scheduler_ms",
        value=spent.median,
        op="<=",
        target=TARGET_MS,
        unit=unit,
        num_runs=spent.num_runs,
        low=spent.low,
        high=spent.high,
        reason=f"num_runs counts steps; low and high hold their median with {100 * spent.coverage:.1f} %",
    )


def _cold_row(num_runs: int) -> Row:
    """Return medians of the seconds that a cold ``elbowroom run`` takes, in all and by part."""
    whole: list[float] = []
    parts: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "elbowroom.commands", *COLD_ARGUMENTS]
    for _ in range(num_runs):
        started = time.monotonic()
        subprocess.run(command, capture_output=True, check=True, timeout=120)
        whole.append(time.monotonic() - started)
        spec = {"arguments": COLD_ARGUMENTS, "spawned_s": time.monotonic()}
        parts.append(run_child(spec, module="elbowroom.bench.cold_child"))
    medians = {f"{part}_s": statistics.median(run[part] for run in parts) for part in parts[0]}
    return {"cold": "elbowroom run", "num_runs": num_runs, "process_s": statistics.median(whole), **medians}
