"""The part of serve-fair that runs for real: a small load on the built-in model, which saves to a real directory.

The load is made for this machine, whose steps were measured. Every variant replays it in real time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from elbowroom.bench.base import Row
from elbowroom.bench.fair_load import Tenants, facts_of, jain
from elbowroom.bench.load_real import engine
from elbowroom.bench.load_setup import Policies, SimulatedServer
from elbowroom.workloads.metrics import Targets
from elbowroom.workloads.replay import Replay

SMALL = Tenants(num_light=6, turns=4, pause_s=3.0, prompt=400, answer=150, limit=400, held=5)
WAYS = {
    "fcfs, recomputed": Policies(order="fcfs"),
    "fair, recomputed": Policies(order="fair"),
    "fair, saved by run, async, kept": Policies(order="fair", preemption="swap"),
}


def real_rows(server: SimulatedServer, seed: int, quick: bool) -> list[Row]:
    """Return a row for each way to serve.

    Args:
        server: fitted to this machine and the built-in model.
        seed: of the load.
        quick: two turns a second apart.
    """
    tenants = Tenants(2, 3, 2, 1.0, SMALL.prompt, SMALL.answer, SMALL.limit, SMALL.held) if quick else SMALL
    load, kv_bytes = tenants.load(server, seed)
    rows = list[Row]()
    for name, policies in WAYS.items():
        with (
            tempfile.TemporaryDirectory() as directory,
            engine(policies, kv_bytes=kv_bytes, swap=Path(directory)) as made,
        ):
            found = Replay(made, seed, tenants.limit).run(load)
        summary = found.summary(Targets())
        rows.append(
            {
                **facts_of(found, "light"),
                **facts_of(found, "heavy"),
                "server": "real",
                "variant": name,
                "seed": seed,
                "requests_per_s": summary.requests_per_s,
                "num_failed": summary.num_failed,
                "evictions": summary.evictions,
                "recomputed_tokens": summary.recomputed_tokens,
                "moved_bytes": summary.swapped_bytes,
                "jain": jain(found),
            }
        )
    return rows
