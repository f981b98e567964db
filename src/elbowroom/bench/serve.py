"""serve: a trace against admission policies, simulated or for real.

Without ``--trace`` a small load is made, and runs on both executors: each row of the simulation, whose costs are fitted
to the real steps, says how far it is off (``error_...``: simulated / real - 1). Defaults: the KV cache gets 0.7 of the
mean live KV of an unlimited run; TTFT 10 s and largest gap 1.5 s. The simulated server is an 8B model on a GPU
(``ServingCostModel``), the real one the built-in model on this machine, whose context ends at 4,096 tokens: what is
longer fails there, and counts as a failure.
"""

from __future__ import annotations

import math
from dataclasses import replace

from elbowroom.bench.base import BenchOptions, BenchResult, LoadOptions, Row
from elbowroom.bench.load_real import fitted_server, probe_load, replay
from elbowroom.bench.load_report import Shown, html
from elbowroom.bench.load_setup import KV_SHARE, SimulatedServer
from elbowroom.bench.machine import machine_info
from elbowroom.bench.serve_admission import summary_row
from elbowroom.models.directory import find_model
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.units import parse_bytes
from elbowroom.workloads.base import Workload
from elbowroom.workloads.metrics import RunRecord, Targets
from elbowroom.workloads.traces import read_trace
from elbowroom.workloads.traces.base import TraceOptions

COMPARED = "goodput", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "peak_kv_bytes", "evictions"
QUICK_REQUESTS = 20


def run(options: BenchOptions) -> BenchResult:
    """Replay the trace under each policy."""
    load = options.load or LoadOptions()
    targets = Targets(load.ttft_s, load.gap_s)
    workload = _workload(load, options)
    runs = _simulated(workload, load) if load.simulate else _real(workload, load, options)
    shown = [Shown(label, record, record.summary(targets)) for label, _, record, _ in runs]
    rows: list[Row] = [
        {"executor": label.split()[-1], "kv_bytes": kv_bytes, **summary_row(policy, each.summary), **_more(each)}
        for each, (label, policy, _, kv_bytes) in zip(shown, runs, strict=True)
    ]
    rows = _with_errors(rows)
    if load.report is not None:
        facts = {
            "workload": workload.name,
            "requests": len(workload.requests),
            "requests a second": workload.rate,
            "TTFT target": f"{targets.ttft_s:g} s",
            "gap target": f"{targets.gap_s:g} s",
        }
        load.report.write_text(html(f"elbowroom bench serve: {workload.name}", facts, shown, rows), encoding="utf-8")
    return BenchResult(name="serve", machine=machine_info(probe=False), rows=rows, claims=[])


def _workload(load: LoadOptions, options: BenchOptions) -> Workload:
    count = QUICK_REQUESTS if options.quick and load.num_requests is None else load.num_requests
    if load.trace is None:
        return probe_load(options.seed, count or 60)
    tokenizer = Tokenizer.from_directory(find_model(None))
    made = read_trace(
        load.trace,
        TraceOptions(count_tokens=lambda text: len(tokenizer.encode(text)), num_requests=count, seed=options.seed),
    )
    return made if load.rate is None else made.at_rate(load.rate)


Run = tuple[str, str, RunRecord, int]
"""Label, policy, what happened, bytes of KV cache."""


def _simulated(workload: Workload, load: LoadOptions, server: SimulatedServer | None = None) -> list[Run]:
    server = server or SimulatedServer.of_8b(prefix_cache=workload.has_block_keys)
    kv_bytes = parse_bytes(load.memory) if load.memory else int(KV_SHARE * server.mean_live_bytes(workload))
    return [
        (f"{policy} simulated", policy, server.run(workload, policy, kv_bytes), kv_bytes) for policy in load.policies
    ]


def _real(workload: Workload, load: LoadOptions, options: BenchOptions) -> list[Run]:
    """Run for real, and simulated with costs fitted to an unlimited real run."""
    fitted = fitted_server(workload, options.seed)
    live = fitted.record.summary(Targets()).mean_kv_bytes
    least = fitted.server.pricing.by_blocks[-1]
    kv_bytes = parse_bytes(load.memory) if load.memory else max(int(KV_SHARE * live), least)
    runs: list[Run] = []
    for policy in load.policies:
        runs.append((f"{policy} real", policy, replay(workload, policy, kv_bytes, options.seed), kv_bytes))
        runs += _simulated(workload, replace(load, memory=str(kv_bytes), policies=(policy,)), fitted.server)
    return runs


def _more(shown: Shown) -> Row:
    """Return what the report shows beside the common columns."""
    made = shown.summary
    columns: dict[str, float] = {
        "output_tokens_per_s": made.output_tokens_per_s,
        "ttfvt_p50_s": made.ttfvt.p50,
        "e2e_p50_s": made.e2e.p50,
        "straggler": made.straggler,
        "std_kv_bytes": made.std_kv_bytes,
        "mean_waiting": made.mean_waiting,
        "makespan_s": made.makespan_s,
    }
    return {name: None if math.isnan(value) else value for name, value in columns.items()}


def _with_errors(rows: list[Row]) -> list[Row]:
    """Add to simulated rows how far they are from the real one before them."""
    made: list[Row] = []
    for number, row in enumerate(rows):
        before = rows[number - 1] if number else {}
        if row["executor"] == "simulated" and before.get("executor") == "real":
            made.append({**row, **{f"error_{name}": _error(row[name], before[name]) for name in COMPARED}})
        else:
            made.append(row)
    return made


def _error(simulated: object, real: object) -> float | None:
    if not isinstance(simulated, int | float) or not isinstance(real, int | float) or not real:
        return None
    return simulated / real - 1
