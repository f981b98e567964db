"""Stores side by side: bytes committed for real lengths, speed of decoding, cost of reservations, runs when moved.

``static`` commits whole rows of 8,192 tokens at the start, ``paged`` takes strips of 64 tokens, ``contiguous`` commits
single pages under plain tensors. Keys and values of a model of 336M parameters in bfloat16, without the model.
"""

from __future__ import annotations

import statistics
import sys

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.kv_shapes import BF16, layers_of
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import MedianInterval, median_ratio
from elbowroom.bench.store_speed import Decoding, burst_row, decode_turns, moved_row, sdpa_seconds
from elbowroom.bench.store_waste import read_lengths, waste_rows
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.plan import KVPlan

_STORES = ("contiguous", "static", "paged")
_RESERVED_ROWS = 64


def run(options: BenchOptions) -> BenchResult:
    """Measure stores on the lengths of the Azure trace and on one batch."""
    plan = KVPlan.parse(BF16).bind(layers_of("20M" if options.quick else "336M"), "bfloat16")
    rows = waste_rows(plan, read_lengths(40 if options.quick else 400, options.seed))
    claims = [_waste_claim(rows)]
    sys.stderr.write("  bytes committed\n")
    found, made = _speed(plan, options)
    rows, claims = [*rows, *found], [*claims, *made]
    sys.stderr.write("  decoding\n")
    rows += _reservations(plan, options)
    sys.stderr.write("  reservations\n")
    rows += [moved_row(name, plan, 8, options.seed) for name in ("contiguous", "paged")]
    sys.stderr.write("  moves\n")
    burst = burst_row(plan, 4, 1024, options.seed)
    back = burst["back_s"]
    assert isinstance(back, float)
    claims.append(
        Claim(
            id="stores.release",
            value=back,
            op="<=",
            target=1.0,
            unit="s",
            reason="until RSS is what it was, within 2 %",
        )
    )
    return BenchResult(name="stores", machine=machine_info(), rows=[*rows, burst], claims=claims)


def _waste_claim(rows: list[Row]) -> Claim:
    (ours,) = [row for row in rows if row["store"] == "contiguous"]
    value = ours["worst_over_live_and_a_page_a_layer"]
    assert isinstance(value, float)
    return Claim(
        id="stores.waste",
        value=value,
        op="<=",
        target=0.02,
        unit="share of live bytes and one page a layer that is committed on top",
        reason="the worst sequence, at any length that was looked at",
    )


def _speed(plan: BoundPlan, options: BenchOptions) -> tuple[list[Row], list[Claim]]:
    """Decode the same batch from every store."""
    num_rows, tokens, steps, rounds = (2, 256, 2, 4) if options.quick else (4, 2048, 4, 16)
    most = tokens + (rounds + 4) * steps + 64
    sides = {name: Decoding(name, plan, num_rows, tokens, most, options.seed) for name in _STORES}
    outs = {name: side.step() for name, side in sides.items()}
    turns = decode_turns(sides, steps, rounds)
    sdpa_s, sdpa_error = sdpa_seconds(sides["contiguous"])
    rows: list[Row] = []
    for name in sides:
        seconds = MedianInterval.of(turns.figures(name, "seconds"))
        row: dict[str, object] = {"part": "decode", "store": name, "batch": num_rows, "context_tokens": tokens}
        row |= {"step_s": seconds.median, "low_s": seconds.low, "high_s": seconds.high}
        row["tokens_per_s"] = num_rows / seconds.median
        row["greatest_difference"] = float((outs[name] - outs["static"]).abs().max())
        rows.append(row)
    rows.append(
        {"part": "decode", "store": "contiguous by torch SDPA", "step_s": sdpa_s, "greatest_difference": sdpa_error}
    )
    claims = []
    for name, rival in (("stores.decode", "static"), ("stores.decode_paged", "paged")):
        ratio = median_ratio(turns, "contiguous", rival, "seconds")
        assert ratio is not None, "no store refuses"
        claims.append(
            Claim(
                id=name,
                value=ratio.median,
                op="<=",
                target=1.03,
                unit=f"seconds of a decode step over those of {rival}",
                num_runs=ratio.num_runs,
                low=ratio.low,
                high=ratio.high,
            )
        )
    return rows, claims


def _reservations(plan: BoundPlan, options: BenchOptions) -> list[Row]:
    """Reserve decode steps of a full batch, without attention."""
    rows: list[Row] = []
    for name in _STORES:
        side = Decoding(name, plan, _RESERVED_ROWS, 0, 1024, options.seed)
        side.grow(512)
        count = 50 if options.quick else 256
        seconds = sorted(side.reserve_only() for _ in range(count))
        rows.append(
            {
                "part": "reservation",
                "store": name,
                "batch": _RESERVED_ROWS,
                "mean_s": statistics.fmean(seconds),
                "p50_s": seconds[count // 2],
                "p99_s": seconds[count * 99 // 100],
                "most_s": seconds[-1],
            }
        )
    return rows
