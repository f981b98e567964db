"""Runs of workloads on the real executor, and a simulated server whose costs are fitted to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elbowroom.bench.load_setup import Policies, SimulatedServer
from elbowroom.engine.build import build_engine
from elbowroom.engine.engine import Engine
from elbowroom.engine.executors.measuring import MeasuringExecutor
from elbowroom.engine.scheduling import Scheduling
from elbowroom.workloads.arrivals import GammaArrivals
from elbowroom.workloads.base import Workload
from elbowroom.workloads.fit import fit_costs
from elbowroom.workloads.generate import Generator
from elbowroom.workloads.lengths import LognormalLengths
from elbowroom.workloads.metrics import RunRecord
from elbowroom.workloads.replay import Replay

ENGINE_BYTES = "512MiB"
"""Budget of an engine whose KV cache nothing limits, for the built-in model."""
MAX_SEQUENCES = 32
PROBE_LIMIT = 400
"""max_tokens of the load that is made."""


@contextmanager
def engine(
    policies: Policies, prefix_cache: bool = False, kv_bytes: int | None = None, swap: Path | None = None
) -> Iterator[Engine]:
    """Run the built-in model with ``kv_bytes`` of KV cache (None: more than it needs)."""
    made = build_engine(
        None,
        ENGINE_BYTES,
        max_sequences=MAX_SEQUENCES,
        prefix_cache=prefix_cache,
        scheduling=Scheduling(
            admission=policies.admission,
            order=policies.order,
            preemption=policies.preemption,
            swap_directory=swap if policies.saves else None,
        ),
    )
    try:
        if kv_bytes is not None:
            ledger = made.parts.ledger
            made.set_budget(ledger.total("host") - ledger.held("kv", "host") + kv_bytes)
        yield made
    finally:
        made.close()


def replay(
    workload: Workload,
    policies: Policies,
    max_tokens: int,
    kv_bytes: int | None = None,
    seed: int = 0,
    swap: Path | None = None,
) -> RunRecord:
    """Replay a workload for real; clients send ``max_tokens``."""
    with engine(policies, workload.has_block_keys, kv_bytes, swap) as made:
        return Replay(made, seed, max_tokens).run(workload)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A simulated server that should take as long as the real one."""

    server: SimulatedServer
    num_layers: int
    mean_error: float
    """Mean of |price - measured| / measured over the steps that it was fitted to."""
    record: RunRecord
    """The real run that was measured, without a limit on the KV cache."""


def fitted_server(workload: Workload | None = None, seed: int = 0) -> Fitted:
    """Replay a workload (None: a small one that is made) on the built-in model, and fit costs to its steps."""
    load = probe_load(seed) if workload is None else workload
    with engine(Policies(), load.has_block_keys) as made:
        core = made.parts.core
        measured = MeasuringExecutor(core.executor)
        core.executor = measured
        record = Replay(made, seed).run(load)
        cost = fit_costs(measured.steps)
        errors = [abs(cost.step_seconds(shape) - seconds) / seconds for shape, seconds in measured.steps]
        scheduler = core.scheduler
        server = SimulatedServer(
            pricing=scheduler.account.pricings[0],
            cost=cost,
            max_positions=scheduler.config.max_positions,
            max_step_tokens=scheduler.config.max_step_tokens,
            max_sequences=scheduler.config.max_sequences,
            prefix_cache=load.has_block_keys,
        )
        num_layers = made.parts.config.num_layers
    return Fitted(server, num_layers, float(np.mean(errors)), record)


def probe_load(seed: int, count: int = 60) -> Workload:
    """Return a small load with prompts, answers and queues of many sizes."""
    made = Generator(
        arrivals=GammaArrivals(30.0, 1.5),
        prompts=LognormalLengths(200, 1.0, 800),
        outputs=LognormalLengths(150, 0.8, PROBE_LIMIT),
    )
    return made.make(count, seed, "probe")
