"""kv-capacity: how many tokens do 256 MiB hold, with all that keeping them takes?

24 layers of 2 KV heads of 64 in bfloat16, eight sequences of equal length. Ours: for each plan a process of its own,
a store whose strips, scales, unfinished blocks, pages and tables (arrays counted in full) share the 256 MiB. Sequences
grow by prompt steps until one is refused, go back to where one token fits behind them, and decode until that is refused
too. What the process grows by in a decode step is its peak while the step attends minus what was resident before.

transformers' QuantizedCache (quanto, default settings) holds the same shapes in processes of its own, for several
lengths. Its tokens are those at which the process has grown by 256 MiB, between the lengths measured: at rest, at the
peak of a decode step, and at the peak of every 128th, which quantizes the cache again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.child import run_child
from elbowroom.bench.kv_shapes import BF16, KIVI2, PLANS, QUICK_PLANS
from elbowroom.bench.machine import machine_info, usable_threads
from elbowroom.bench.pairs import one_line
from elbowroom.bench.side import SIDES, Side, rival_environment
from elbowroom.errors import ElbowroomError

MIB = 2**20
HEADS = {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64}
NUM_SEQUENCES = 8
MIN_RIVAL_TOKENS = 256
"""Twice what the rival's sequences keep unquantized."""
TARGET_RATIO, TARGET_MIB = 5.0, 8
MOMENTS = {"rest": "at rest", "decode": "decode step", "flush": "decode step that quantizes again"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is held, and where."""

    arena_bytes: int = 256 * MIB
    num_layers: int = 24
    plans: tuple[str, ...] = PLANS
    rival_bits: tuple[int, ...] = (4, 2)
    rival_lengths: tuple[int, ...] = (1, 2, 3, 4, 6)
    """Of the rival's sequences, as multiples of those that bfloat16 has room for."""
    seed: int = 0

    @classmethod
    def of(cls, options: BenchOptions) -> Load:
        """Return the full load, or the quick one."""
        if not options.quick:
            return cls(seed=options.seed)
        return cls(
            arena_bytes=12 * MIB,
            num_layers=6,
            plans=QUICK_PLANS,
            rival_bits=(4,),
            rival_lengths=(4,),
            seed=options.seed,
        )

    @property
    def shape(self) -> dict[str, int]:
        """Layers and heads."""
        return {"num_layers": self.num_layers, **HEADS}


def run(options: BenchOptions) -> BenchResult:
    """Measure every plan and the rival in 4 and 2 bits (quick: few plans in a small arena, the rival in 4)."""
    machine, load = machine_info(), Load.of(options)
    ours = [_our_row(kv, load) for kv in load.plans]
    base = int(ours[0]["num_tokens"])
    rows = [ours[0], *(row | ratio_of(str(row["kv"]), row["num_tokens"], base) for row in ours[1:])]
    claims = [_ratio_claim(rows), _peak_claim(rows)]
    for bits in load.rival_bits:
        rows += _rival_rows(bits, base, load)
    return BenchResult(name="kv-capacity", machine=machine, rows=list[Row](rows), claims=claims)


def _our_row(kv: str, load: Load) -> dict[str, Any]:
    spec = {"kv": kv, "arena_bytes": load.arena_bytes, "shape": load.shape, "seed": load.seed}
    measured = run_child(
        spec | {"num_sequences": NUM_SEQUENCES}, timeout_s=1800.0, module="elbowroom.bench.kv_capacity_child"
    )
    sys.stderr.write(f"  {kv} {measured['num_tokens']} tokens\n")
    return {"side": "ours", "kv": kv, "arena_bytes": load.arena_bytes, **measured}


def ratio_of(what: str, num_tokens: float | None, base: int) -> dict[str, Any]:
    """Return how many times the tokens of bfloat16 ``what`` holds."""
    return {"ratio": f"tokens held, {what} / {BF16}", "value": None if num_tokens is None else num_tokens / base}


def tokens_at(points: Sequence[tuple[float, float]], num_bytes: int) -> float | None:
    """Return the tokens at which the bytes of ``points`` (tokens, bytes) reach ``num_bytes``.

    Points ascend; between them, and from nothing to the first one, lines are drawn. None: they end below.
    """
    before = (0.0, 0.0)
    for tokens, held in points:
        if held >= num_bytes:
            return before[0] + (tokens - before[0]) * (num_bytes - before[1]) / (held - before[1])
        before = (tokens, max(held, 0.0))
    return None


def _ratio_claim(rows: Sequence[Mapping[str, Any]]) -> Claim:
    ratio = {row["kv"]: row["value"] for row in rows if "ratio" in row}
    return Claim(
        id="capacity.kivi2",
        value=ratio[KIVI2],
        op=">=",
        target=TARGET_RATIO,
        unit=f"x tokens of {BF16}",
        reason=f"{KIVI2}; with g=32 {ratio['kivi(2,2,32)']:.2f} x",
    )


def _peak_claim(rows: Sequence[Mapping[str, Any]]) -> Claim:
    peaks = {row["kv"]: row["decode_peak_bytes"] / MIB for row in rows}
    worst = max(peaks, key=lambda kv: peaks[kv])
    return Claim(
        id="capacity.peak",
        value=peaks[worst],
        op="<=",
        target=TARGET_MIB,
        unit="MiB above what was resident, worst decode step",
        num_runs=len(peaks),
        low=min(peaks.values()),
        high=peaks[worst],
        reason=f"worst of all steps and plans: {worst}; low and high are the worst steps of the plans",
    )


def _rival_rows(bits: int, base: int, load: Load) -> list[dict[str, Any]]:
    name = f"transformers-quanto{bits}"
    try:
        grown = _rival_growth(name, bits, base, load)
    except ElbowroomError as error:
        return [{"side": name, "num_tokens": None, "reason": one_line(error)}]
    rows = []
    for moment, when in MOMENTS.items():
        points = [(float(each["num_tokens"]), float(each[moment])) for each in grown]
        held = tokens_at(points, load.arena_bytes)
        row = {"side": name, "version": grown[0]["version"], "when": when, "arena_bytes": load.arena_bytes}
        rows.append(row | {"num_tokens": held, "measured": points, **ratio_of(f"{name}, {when}", held, base)})
    return rows


def _rival_growth(name: str, bits: int, base: int, load: Load) -> list[dict[str, Any]]:
    """Return by what fresh processes of the rival grew, at each moment, with more and more tokens."""
    threads, grown = usable_threads(), []
    for multiple in load.rival_lengths:
        length = max(multiple * base // NUM_SEQUENCES, MIN_RIVAL_TOKENS)
        with Side(SIDES / "hf_cache.py", rival_environment(threads)) as side:
            side.ask("load", **load.shape, num_bits=bits, num_threads=threads)
            grew = side.ask("hold", num_tokens=length, num_streams=NUM_SEQUENCES, seed=load.seed)
        grown.append({"num_tokens": length * NUM_SEQUENCES, **grew})
        sys.stderr.write(f"  {name} {length * NUM_SEQUENCES} tokens, {grew['rest'] // MIB} MiB at rest\n")
        if min(grew[moment] for moment in MOMENTS) > load.arena_bytes:
            break
    return grown
