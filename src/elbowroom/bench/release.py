"""release: does freed KV memory go back to the operating system, page by page, within a second?

In a fresh process on the built-in model: cached prefixes of finished requests are dropped (``cleared``), and of
sequences that grew in turns, block by block, every second one is closed (``interleaved``). The share is the fall of
VmRSS over the bytes that the ledger freed.
"""

from __future__ import annotations

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.child import run_child
from elbowroom.bench.machine import machine_info

TARGETS = {"cleared": 0.98, "interleaved": 0.90}
NUM_RUNS = 3


def run(options: BenchOptions) -> BenchResult:
    """Measure three processes (quick: one, with fewer and shorter sequences)."""
    machine = machine_info()
    spec = {"task": "release", "model": None, "memory": 320 * 2**20, "sequences": 32, "tokens": 640}
    if options.quick:
        spec |= {"sequences": 8, "tokens": 256}
    rows: list[Row] = []
    for number in range(1 if options.quick else NUM_RUNS):
        result = run_child(spec)
        for name in (*TARGETS, "closed"):
            freed, fell = result[name]["freed_bytes"], result[name]["rss_bytes"]
            rows.append(
                {"run": number, "freed": name, "freed_bytes": freed, "rss_fell_bytes": fell, "share": fell / freed}
            )
    claims = [_claim(name, target, rows) for name, target in TARGETS.items()]
    return BenchResult(name="release", machine=machine, rows=rows, claims=claims)


def _claim(name: str, target: float, rows: list[Row]) -> Claim:
    shares = sorted(float(str(row["share"])) for row in rows if row["freed"] == name)
    return Claim(
        id=f"release.{name}",
        value=shares[0],
        op=">=",
        target=target,
        unit="share of freed bytes, worst run",
        num_runs=len(shares),
        low=shares[0],
        high=shares[-1],
    )
