"""serve: a trace against policies of admission, order and preemption, simulated or for real.

Without ``--trace`` a small load is made, and runs on both executors: each row of the simulation, whose costs are fitted
to the real steps, says how far it is off (``error_...``: simulated / real - 1). Defaults: the KV cache gets 0.7 of the
mean live KV of an unlimited run; TTFT 10 s and largest gap 1.5 s. The simulated server is an 8B model on a GPU
(``ServingCostModel``), the real one the built-in model on this machine, whose context ends at 4,096 tokens: what is
longer fails there, and counts as a failure. Where policies save sequences, real runs need ``--swap DIR``, and simulated
ones take the measured cost of that directory, or else that of a second memory over PCIe.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from elbowroom.bench.base import BenchOptions, BenchResult, LoadOptions, Row
from elbowroom.bench.load_real import PROBE_LIMIT, fitted_server, probe_load, replay
from elbowroom.bench.load_report import Shown, html
from elbowroom.bench.load_setup import KV_SHARE, MAX_TOKENS, Policies, SimulatedServer, swap_cost
from elbowroom.bench.machine import machine_info
from elbowroom.bench.serve_admission import summary_row
from elbowroom.errors import RequestError
from elbowroom.models.directory import find_model
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.units import parse_bytes
from elbowroom.workloads.base import Workload
from elbowroom.workloads.metrics import RunRecord, RunSummary, Targets
from elbowroom.workloads.traces import read_trace
from elbowroom.workloads.traces.base import TraceOptions

COMPARED = "goodput", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "e2e_p50_s", "peak_kv_bytes", "evictions"
QUICK_REQUESTS = 20


def run(options: BenchOptions) -> BenchResult:
    """Replay the trace under each policy."""
    load = options.load or LoadOptions()
    targets = Targets(load.ttft_s, load.gap_s)
    workload = _workload(load, options)
    runs = _simulated(workload, load) if load.simulate else _real(workload, load, options)
    shown = [Shown(f"{each.policies} {each.executor}", each.record, each.record.summary(targets)) for each in runs]
    rows = _with_errors([_row(each, made.summary) for each, made in zip(runs, shown, strict=True)])
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
        return probe_load(options.seed, count or 200)
    tokenizer = Tokenizer.from_directory(find_model(None))
    made = read_trace(
        load.trace,
        TraceOptions(count_tokens=lambda text: len(tokenizer.encode(text)), num_requests=count, seed=options.seed),
    )
    return made if load.rate is None else made.at_rate(load.rate)


@dataclass(frozen=True, slots=True)
class Run:
    """What happened under some policies."""

    executor: str
    """``real`` or ``simulated``."""
    policies: Policies
    record: RunRecord
    kv_bytes: int
    """Of the KV cache."""


def _choices(load: LoadOptions) -> list[Policies]:
    """Return all combinations of what was named."""
    made = [Policies(*names) for names in itertools.product(load.policies, load.orders, load.preemptions)]
    if load.swap is None and not load.simulate and any(each.saves for each in made):
        raise RequestError(
            "preemption swap and auto save sequences, and a real run needs a place for them",
            "name a directory: --swap DIR, or add --simulate",
        )
    return made


def _simulated(workload: Workload, load: LoadOptions) -> list[Run]:
    server, cost = SimulatedServer.of_8b(prefix_cache=workload.has_block_keys), swap_cost(load.swap)
    limit = _limit(load)
    kv_bytes = parse_bytes(load.memory) if load.memory else server.part_of_live(workload, KV_SHARE, limit)
    return [
        Run("simulated", policies, server.run_under(policies, workload, kv_bytes, limit, cost), kv_bytes)
        for policies in _choices(load)
    ]


def _real(workload: Workload, load: LoadOptions, options: BenchOptions) -> list[Run]:
    """Run for real, and simulated with costs fitted to an unlimited real run."""
    choices, runs = _choices(load), list[Run]()
    fitted, cost = fitted_server(workload, options.seed), swap_cost(load.swap)
    server, live = fitted.server, fitted.record.summary(Targets()).mean_kv_bytes
    limit = _limit(load)
    least = max(int(KV_SHARE * live), server.least_bytes(workload, limit))
    kv_bytes = parse_bytes(load.memory) if load.memory else least
    for policies in choices:
        record = replay(workload, policies, limit, kv_bytes, options.seed, load.swap)
        runs.append(Run("real", policies, record, kv_bytes))
        record = server.run_under(policies, workload, kv_bytes, limit, cost)
        runs.append(Run("simulated", policies, record, kv_bytes))
    return runs


def _limit(load: LoadOptions) -> int:
    return load.max_tokens or (PROBE_LIMIT if load.trace is None else MAX_TOKENS)


def _row(run: Run, made: RunSummary) -> Row:
    """Return the row of a run: what all benchmarks of loads have, and what the report shows beside it."""
    columns: dict[str, float] = {
        "output_tokens_per_s": made.output_tokens_per_s,
        "ttfvt_p50_s": made.ttfvt.p50,
        "e2e_p50_s": made.e2e.p50,
        "straggler": made.straggler,
        "std_kv_bytes": made.std_kv_bytes,
        "mean_waiting": made.mean_waiting,
        "makespan_s": made.makespan_s,
        "swapped_bytes": made.swapped_bytes,
    }
    return {
        "executor": run.executor,
        "order": run.policies.order,
        "preemption": run.policies.preemption,
        "kv_bytes": run.kv_bytes,
        **summary_row(run.policies.admission, made),
        **{name: None if math.isnan(value) else value for name, value in columns.items()},
        "first_failure": next((each.error for each in run.record.requests if each.error), None),
    }


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
