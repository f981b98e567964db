"""serve-fair: do light tenants keep their latency beside heavy ones, and what does switching between them cost?

Load: two heavy tenants ask for long answers (prompts of 1,500 tokens, answers of 400, on average) at 1.2 times of what
the server can do; twenty light ones have conversations of six turns (60 new tokens, answers of 80, 40 s apart). The KV
cache holds sixteen of the heavy sequences. Compared, from the usual way to fast switching (Shen et al., 2024, arXiv
2411.18424): first come first served with recomputing; tenants in fair turns with recomputing; fair turns with sequences
that are saved, in 16-token blocks of each layer, while all wait; the same in long runs; while others go on; and with
what was saved before kept, so that only new tokens are written.

Two servers, both simulated by the scheduler that serves: ``emulated-device``, an 8B model that saves to a second pool
of memory over a link of 25 GB/s at 10 us a copy (PCIe 4.0 x16); and ``disk``, the built-in model on this machine, its
costs fitted to measured steps and measured writes and reads of a temporary directory. The claim is about the first.
Three of the ways run for real, too, with a smaller load on the built-in model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.fair_load import Tenants, facts_of, jain
from elbowroom.bench.fair_real import WAYS, real_rows
from elbowroom.bench.load_real import fitted_server
from elbowroom.bench.load_setup import LINK, SimulatedServer, server_layers, swap_cost
from elbowroom.bench.machine import machine_info
from elbowroom.engine.executors.simulated_transfers import SimTransfers, SwapShape
from elbowroom.engine.ordering import ORDERS
from elbowroom.engine.preemption import PreemptPolicy
from elbowroom.engine.preemption.recompute import RecomputePreemption
from elbowroom.engine.preemption.swap import SwapPreemption
from elbowroom.memory.swap_cost import SwapCost
from elbowroom.workloads.base import Workload
from elbowroom.workloads.metrics import RunRecord, Targets

CHUNK = 512
"""Tokens of a step: with longer chunks the gaps of all variants are those of the heavy tenants' prompts."""
SEEDS = 5
GAP = 0.5
BLOCK = 16
"""Tokens of a block that is moved alone."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve."""

    name: str
    order: str
    saves: bool = False
    is_async: bool = False
    in_blocks: bool = False
    keeps_copies: bool = False

    def preemption(self) -> PreemptPolicy:
        """Return the policy."""
        return SwapPreemption(is_async=self.is_async) if self.saves else RecomputePreemption()


BY_BLOCK, FAST = "fair, saved by block", "fair, saved by run, async, kept"
VARIANTS = (
    Variant("fcfs, recomputed", "fcfs"),
    Variant("fair, recomputed", "fair"),
    Variant(BY_BLOCK, "fair", saves=True, in_blocks=True),
    Variant("fair, saved by run", "fair", saves=True),
    Variant("fair, saved by run, async", "fair", saves=True, is_async=True),
    Variant(FAST, "fair", saves=True, is_async=True, keeps_copies=True),
)


@dataclass(frozen=True, slots=True)
class Site:
    """A server, and the tier that it saves to."""

    name: str
    server: SimulatedServer
    cost: SwapCost
    num_parts: int
    """Runs of bytes that a block of 16 tokens is moved as: keys and values of each layer."""


def run(options: BenchOptions) -> BenchResult:
    """Run all variants on both servers, and some for real."""
    seeds, tenants = (1, Tenants(turns=2)) if options.quick else (SEEDS, Tenants())
    sites = [
        Site(
            "emulated-device", replace(SimulatedServer.of_8b(), max_step_tokens=CHUNK), LINK, 2 * len(server_layers())
        ),
        _disk(options.seed),
    ]
    rows, gaps = list[Row](), dict[str, list[float]]()
    for site in sites:
        for seed in range(options.seed, options.seed + seeds):
            load, kv_bytes = tenants.load(site.server, seed)
            for variant in VARIANTS:
                row = _row(site, variant, load, kv_bytes, seed, tenants.limit)
                rows.append(row)
                if site is sites[0]:
                    gaps.setdefault(variant.name, []).append(float(str(row["light_gap_p99_s"])))
            sys.stderr.write(f"  {site.name}, seed {seed}: {_shown(rows[-len(VARIANTS) :])}\n")
    rows += real_rows(sites[1].server, options.seed, options.quick)
    sys.stderr.write(f"  real: {_shown(rows[-len(WAYS) :])}\n")
    return BenchResult(name="serve-fair", machine=machine_info(probe=False), rows=rows, claims=[_claim(gaps)])


def _disk(seed: int) -> Site:
    """Return this machine with the built-in model."""
    fitted = fitted_server(seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        cost = swap_cost(Path(directory))
    return Site("disk", fitted.server, cost, 2 * fitted.num_layers)


def _row(site: Site, variant: Variant, load: Workload, kv_bytes: int, seed: int, limit: int) -> Row:
    shape = SwapShape(site.server.token_bytes, keeps_copies=variant.keeps_copies)
    if variant.in_blocks:
        shape = replace(shape, run_tokens=BLOCK, num_parts=site.num_parts)
    transfers = SimTransfers(site.cost, shape)
    found = site.server.run(
        load,
        "greedy",
        kv_bytes,
        limit,
        order=ORDERS.get(variant.order)(),
        preemption=variant.preemption(),
        transfers=transfers,
    )
    return facts_of(found, "light") | facts_of(found, "heavy") | _common(site, variant, found, seed, transfers)


def _common(site: Site, variant: Variant, found: RunRecord, seed: int, transfers: SimTransfers) -> dict[str, object]:
    made = found.summary(Targets())
    return {
        "server": site.name,
        "variant": variant.name,
        "seed": seed,
        "requests_per_s": made.requests_per_s,
        "num_failed": made.num_failed,
        "evictions": made.evictions,
        "recomputed_tokens": made.recomputed_tokens,
        "moved_bytes": transfers.moved_bytes,
        "bytes_per_copy": transfers.moved_bytes / transfers.num_copies if transfers.num_copies else None,
        "jain": jain(found),
    }


def _shown(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row['variant']} {float(str(row['light_gap_p99_s'])):.2f} s" for row in rows)


def _claim(gaps: dict[str, list[float]]) -> Claim:
    ratios = [fast / slow for fast, slow in zip(gaps[FAST], gaps[BY_BLOCK], strict=True)]
    return Claim(
        id="fair.gap",
        value=float(np.mean(gaps[FAST]) / np.mean(gaps[BY_BLOCK])),
        op="<=",
        target=GAP,
        unit="p99 of light tenants' largest gaps, fast switching / by block (emulated-device)",
        num_runs=len(ratios),
        low=min(ratios),
        high=max(ratios),
        reason="; ".join(f"{name}: {np.mean(values):.3f} s" for name, values in gaps.items()),
    )
