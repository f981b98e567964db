"""serve-admission: which waiting request may begin? Admission policies on real lengths, from a cold start, simulated.

Loads: windows of 1,000 consecutive requests of the Azure conversation trace, with the gaps of the trace; and 1,000
requests with the lengths of ServeGen's four DeepSeek-R1 clients, each a tenant, and Gamma arrivals (cv 1.5). Seeds
choose the window, and draw lengths and gaps. The server: 20 ms a step, 0.12 ms a prefill token, 0.04 ms a decoding row,
0.2 us a KV token held; chunks of 2,048 tokens, 256 running at most, first come first served, what is evicted is
computed again; clients send max_tokens 4,096.

Memory is 0.5, 0.7 and 0.9 of the mean live KV of an unlimited run, at 0.9 of the rate that the server reaches when
memory does not limit it. With less memory than a load keeps alive the queue of any policy grows without end at that
rate, and every answer is late; so each cell gets 0.9 of the rate at which the oracle serves that memory when all
requests wait at once (found by simulating that), as in Past-Future's sheet. Rows named ``literal`` keep the rate of the
unlimited run, and those named ``small`` have memory for the live KV of a third of it, but at least for one request at
its limit: so few sequences that the luck of each counts. Goodput is requests with TTFT <= 10 s and largest gap <= 1.5 s
over the makespan.

The whole Azure trace (19,366 requests at the load of the middle cell) is simulated once for each policy for the time it
takes, and one cell runs with costs fitted to this machine's executor. All cells together take a quarter of an hour.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.load_real import fitted_server
from elbowroom.bench.load_setup import MAX_POSITIONS, MAX_TOKENS, UNLIMITED, SimulatedServer
from elbowroom.bench.machine import machine_info
from elbowroom.bench.shared_data import DATA
from elbowroom.workloads.arrivals import GammaArrivals
from elbowroom.workloads.base import Workload
from elbowroom.workloads.metrics import RunSummary, Targets
from elbowroom.workloads.traces import read_trace
from elbowroom.workloads.traces.servegen import ServeGenClient

POLICIES = "greedy", "conservative", "past_future", "past_future_paper", "oracle"
SHARES = 0.5, 0.7, 0.9
SEEDS = 5
REQUESTS = 1000
LOADS = "azure", "reasoning"
LOAD = 0.9
"""Of what can be served."""
SMALL = 1 / 3
"""Of the rate of the unlimited run: that of rows with little memory."""
GOODPUT, EVICTIONS, SIMULATE_S = 0.92, 0.15, 30.0
ENOUGH_EVICTIONS = 20
"""Of greedy, over all seeds of a cell; with fewer there is nothing to save."""
AZURE, REASONING = DATA / "traces" / "azure_llm_2023_conv.csv", DATA / "traces" / "servegen_deepseek_r1"
TARGETS = Targets()


@dataclass(frozen=True, slots=True)
class Cell:
    """One load and memory, with the run of each policy and seed."""

    load: str
    share: float
    runs: dict[str, list[RunSummary]]

    def goodput(self, policy: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean([each.goodput for each in self.runs[policy]]))

    def evictions(self, policy: str) -> int:
        """Return the sum over seeds."""
        return sum(each.evictions for each in self.runs[policy])


def run(options: BenchOptions) -> BenchResult:
    """Simulate all cells, and the whole trace once for each policy."""
    machine = machine_info(probe=False)
    missing = [path for path in (AZURE, REASONING) if not path.exists()]
    if missing:
        reason = f"{', '.join(map(str, missing))} not there: set ELBOWROOM_DATA"
        return BenchResult(name="serve-admission", machine=machine, rows=[], claims=_claims([], {}, reason))
    count, seeds = (120, 1) if options.quick else (REQUESTS, SEEDS)
    server, rows, cells = SimulatedServer.of_8b(), list[Row](), list[Cell]()
    for load in LOADS:
        for share in SHARES:
            cell, made = _cell(server, load, share, count, range(options.seed, options.seed + seeds))
            cells.append(cell)
            rows += made
    for load in LOADS:
        rows += _cell(server, load, SHARES[0], count, range(options.seed, options.seed + seeds), SMALL)[1]
    rows += _literal(server, count, options.seed)
    rows += _fitted(count, options.seed)
    seconds = {policy: _whole_trace(server, policy, options.quick, rows) for policy in POLICIES}
    return BenchResult(name="serve-admission", machine=machine, rows=rows, claims=_claims(cells, seconds))


def make_load(load: str, count: int, seed: int) -> Workload:
    """Return one load, at the rate of the trace or one request a second."""
    generator = np.random.default_rng(seed)
    if load == "azure":
        whole = read_trace(AZURE)
        start = int(generator.integers(0, len(whole.requests) - count))
        chosen = whole.requests[start : start + count]
        shifted = [replace(each, arrival_s=each.arrival_s - chosen[0].arrival_s) for each in chosen]
        return Workload(load, tuple(shifted)).with_at_most(MAX_TOKENS)
    clients = [ServeGenClient.load(path) for path in sorted(REASONING.glob("chunk-*-dataset.json"))]
    drawn = [client.lengths(count, generator) for client in clients]
    chosen_by, times = generator.integers(0, len(clients), count), GammaArrivals(1.0, 1.5).times(count, generator)
    requests = [
        replace(drawn[who][i], arrival_s=float(times[i]), tenant=clients[who].name) for i, who in enumerate(chosen_by)
    ]
    return Workload(load, tuple(requests)).with_at_most(MAX_TOKENS)


def unlimited(server: SimulatedServer, workload: Workload, part: float = 1.0) -> Workload:
    """Return the workload at ``part`` of the load that the server bears when memory does not limit it."""
    return workload.at_rate(part * LOAD * server.capacity(workload, UNLIMITED))


def _cell(
    server: SimulatedServer, load: str, share: float, count: int, seeds: Sequence[int], part: float = 1.0
) -> tuple[Cell, list[Row]]:
    """Run all policies and seeds of one cell."""
    cell, rows = Cell(load, share, {policy: [] for policy in POLICIES}), list[Row]()
    name = load if part == 1.0 else f"{load}, small"
    for seed in seeds:
        workload = unlimited(server, make_load(load, count, seed), part)
        kv_bytes = server.part_of_live(workload, share)
        rate = LOAD * server.capacity(workload, kv_bytes)
        for policy in POLICIES:
            found = server.run(workload.at_rate(rate), policy, kv_bytes)
            cell.runs[policy].append(made := found.summary(TARGETS))
            facts = {"load": name, "memory_share": share, "seed": seed, "rate": rate, "kv_bytes": kv_bytes}
            rows.append(facts | summary_row(policy, made) | {"simulated_in_s": found.wall_s})
        sys.stderr.write(f"  {name} {share}: seed {seed}, {_goodputs(cell)}\n")
    return cell, rows


def _goodputs(cell: Cell) -> str:
    return ", ".join(f"{policy} {cell.goodput(policy):.3f} ({cell.evictions(policy)})" for policy in POLICIES)


def summary_row(policy: str, made: RunSummary) -> dict[str, object]:
    """Return what the row of a run says."""
    columns: dict[str, float] = {
        "goodput": made.goodput,
        "evictions": made.evictions,
        "ttft_p50_s": made.ttft.p50,
        "ttft_p99_s": made.ttft.p99,
        "tpot_p99_s": made.tpot.p99,
        "gap_p99_s": made.largest_gap.p99,
        "peak_kv_bytes": made.peak_kv_bytes,
        "mean_kv_bytes": made.mean_kv_bytes,
        "recomputed_tokens": made.recomputed_tokens,
        "num_requests": made.num_requests,
        "num_failed": made.num_failed,
    }
    shown = {name: None if math.isnan(value) else value for name, value in columns.items()}  # nothing was answered
    return {"policy": policy, **shown}


def _literal(server: SimulatedServer, count: int, seed: int) -> list[Row]:
    """Keep the rate of the unlimited run: what any policy loses when memory is below what the load keeps alive."""
    rows = list[Row]()
    for load in LOADS:
        workload = unlimited(server, make_load(load, count, seed))
        kv_bytes = server.part_of_live(workload, 0.7)
        for policy in ("greedy", "past_future", "oracle"):
            found = server.run(workload, policy, kv_bytes).summary(TARGETS)
            facts = {"load": f"{load}, literal", "memory_share": 0.7, "seed": seed, "rate": workload.rate}
            rows.append(facts | summary_row(policy, found))
    return rows


def _fitted(count: int, seed: int) -> list[Row]:
    """Run a reasoning cell once with costs fitted to this machine and the built-in model."""
    fitted = fitted_server(seed=seed)
    # The model is small: lengths stay, its context and its steps are what is measured.
    server = replace(fitted.server, pricing=SimulatedServer.of_8b().pricing, max_positions=MAX_POSITIONS)
    workload = unlimited(server, make_load("reasoning", count, seed))
    kv_bytes = server.part_of_live(workload, 0.7)
    workload = workload.at_rate(LOAD * server.capacity(workload, kv_bytes))
    facts = {"load": "reasoning, fitted costs", "memory_share": 0.7, "seed": seed, "rate": workload.rate}
    facts |= {"cost": str(server.cost), "fit_error": fitted.mean_error}
    return [
        facts | summary_row(policy, server.run(workload, policy, kv_bytes).summary(TARGETS))
        for policy in ("greedy", "past_future", "oracle")
    ]


def _whole_trace(server: SimulatedServer, policy: str, quick: bool, rows: list[Row]) -> float:
    """Return the seconds that simulating the whole trace takes."""
    window = unlimited(server, make_load("azure", 120 if quick else REQUESTS, 0))
    kv_bytes = server.part_of_live(window, 0.7)
    whole = read_trace(AZURE).first(500 if quick else None)
    whole = whole.at_rate(LOAD * server.capacity(window, kv_bytes))
    found = server.run(whole, policy, kv_bytes)
    facts: Row = {"load": "azure, whole trace", "memory_share": 0.7, "kv_bytes": kv_bytes, "rate": whole.rate}
    rows.append({**facts, **summary_row(policy, found.summary(TARGETS)), "simulated_in_s": found.wall_s})
    sys.stderr.write(f"  whole trace, {policy}: {found.wall_s:.1f} s\n")
    return found.wall_s


def _claims(cells: Sequence[Cell], seconds: Mapping[str, float], missing: str = "") -> list[Claim]:
    """Return the three claims; each is that of the worst cell or policy."""
    ratios, saved, void = dict[str, float](), dict[str, float](), list[str]()
    for cell in cells:
        name, best = f"{cell.load} {cell.share}", cell.goodput("oracle")
        ratios[name] = cell.goodput("past_future") / best if best else 0.0
        before = cell.evictions("greedy")
        if before >= ENOUGH_EVICTIONS:
            saved[name] = cell.evictions("past_future") / before
        else:
            void.append(f"{name} ({before} evictions)")
    goodput = Claim(
        id="admission.goodput",
        value=min(ratios.values(), default=None),
        op=">=",
        target=GOODPUT,
        unit="goodput of past_future / oracle, worst cell",
        num_runs=SEEDS,
        reason=missing or _shown(ratios),
    )
    evictions = Claim(
        id="admission.evictions",
        value=max(saved.values(), default=None),
        op="<=",
        target=EVICTIONS,
        unit="evictions of past_future / greedy, worst cell that counts",
        num_runs=SEEDS,
        reason=missing or f"{_shown(saved)}; void: {', '.join(void) or 'none'}",
    )
    time_ = Claim(
        id="simulate.seconds",
        value=max(seconds.values(), default=None),
        op="<=",
        target=SIMULATE_S,
        unit="s for the whole Azure trace, slowest policy",
        reason=missing or _shown(seconds),
    )
    return [goodput, evictions, time_]


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {value:.3g}" for name, value in values.items()) or "no cell"
