"""Prometheus metrics of the engines, read when they are asked for: memory, queue, tokens, cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elbowroom.engine.types import SchedulerStats
from elbowroom.kv.base import KVReport
from elbowroom.memory.ledger import Usage
from elbowroom.serve.served import ServedModel

_KV_TIMEOUT_S = 2.0
_STATS: dict[str, tuple[str, Callable[[SchedulerStats], int]]] = {
    "num_requests_waiting": ("Sequences that wait.", lambda stats: stats.num_waiting),
    "num_requests_running": ("Sequences that run.", lambda stats: stats.num_running),
    "num_sessions_parked": ("Sessions kept between two calls.", lambda stats: stats.num_parked),
    "kv_used_bytes": ("KV cache in use as the scheduler counts it.", lambda stats: stats.kv_used_bytes),
    "kv_capacity_bytes": ("KV cache that the budget allows.", lambda stats: stats.kv_capacity_bytes),
    "kv_cached_blocks": ("Blocks of cached prefixes.", lambda stats: stats.cached_blocks),
}
_COUNTERS: dict[str, tuple[str, Callable[[SchedulerStats], int]]] = {
    "prompt_tokens": ("Prompt tokens of started sequences.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Generated tokens.", lambda stats: stats.generated_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens found there.", lambda stats: stats.cached_prompt_tokens),
    "preemptions": ("Sequences that gave way.", lambda stats: stats.preemptions),
    "swaps_out": ("Sequences that gave way and were saved to the swap tier.", lambda stats: stats.swaps_out),
    "swaps_in": ("Sequences that came back from the swap tier.", lambda stats: stats.swaps_in),
    "swapped_bytes": ("Bytes that were written to the swap tier and read from it.", lambda stats: stats.swapped_bytes),
    "failed_swaps": ("Transfers that failed: tokens were computed again.", lambda stats: stats.failed_swaps),
    "kv_reliefs": ("Sequences that went over to the relief plan.", lambda stats: stats.reliefs),
    "kv_evicted_blocks": ("Cached blocks that were given up.", lambda stats: stats.evicted_blocks),
}
_KV: dict[str, tuple[str, Callable[[KVReport], int]]] = {
    "kv_live_bytes": ("Pages that hold keys and values.", lambda report: report.live_bytes),
    "kv_free_bytes": ("Freed pages not yet given back.", lambda report: report.free_bytes),
    "kv_sequences": ("Stored sequences, cached prefixes and parked sessions included.", lambda r: r.num_sequences),
    "kv_tokens": ("Tokens of all stored sequences.", lambda report: report.num_tokens),
    "kv_strips": ("Layer strips held.", lambda report: report.num_strips),
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of one engine at one time."""

    model: str
    is_alive: bool
    num_live: int
    stats: SchedulerStats
    finished: dict[str, int]
    ledger: Mapping[str, Mapping[str, Usage]]
    budget: dict[str, int | None]
    kv: KVReport | None
    """None when the engine did not answer in time."""


async def snapshot(model: ServedModel) -> Snapshot:
    """Return the state of ``model``; the KV report waits for the end of the running step."""
    engine = model.llm.engine
    kv: KVReport | None = None
    if model.llm.is_alive:
        try:
            asked = asyncio.wrap_future(engine.call(engine.parts.store.report))
            kv = await asyncio.wait_for(asked, _KV_TIMEOUT_S)
        except Exception:  # noqa: BLE001  a closed or busy engine has no report; the other numbers are still true
            kv = None
    stats, ledger = engine.stats(), engine.ledger()
    tiers = {tier for usage in ledger.values() for tier in usage}
    budget = {tier: engine.parts.ledger.budget.limit(tier) for tier in sorted(tiers)}
    return Snapshot(model.name, model.llm.is_alive, model.num_live, stats, dict(stats.finished), ledger, budget, kv)


def render(registry: CollectorRegistry, snapshots: list[Snapshot]) -> bytes:
    """Return the text of ``registry`` and of ``snapshots``."""
    engines = CollectorRegistry()
    engines.register(_SnapshotCollector(snapshots))
    return generate_latest(registry) + generate_latest(engines)


class _SnapshotCollector(Collector):
    def __init__(self, snapshots: list[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        shots = self._snapshots
        for name, (text, read) in _STATS.items():
            yield _gauge(name, text, ["model"], (((s.model,), read(s.stats)) for s in shots))
        for name, (text, read) in _COUNTERS.items():
            yield _counter(name, text, ["model"], (((s.model,), read(s.stats)) for s in shots))
        for name, (text, read_kv) in _KV.items():
            yield _gauge(name, text, ["model"], (((s.model,), read_kv(s.kv)) for s in shots if s.kv is not None))
        alive = (((s.model,), s.is_alive) for s in shots)
        yield _gauge("engine_up", "1 while the engine's thread runs.", ["model"], alive)
        live = (((s.model,), s.num_live) for s in shots)
        yield _gauge("live_http_requests", "Requests that wait or are answered.", ["model"], live)
        ended = (((s.model, reason), count) for s in shots for reason, count in s.finished.items())
        yield _counter("requests_finished", "Ended sequences by reason.", ["model", "reason"], ended)
        yield from self._memory()

    def _memory(self) -> Iterator[Metric]:
        limits = (((s.model, tier), limit) for s in self._snapshots for tier, limit in s.budget.items() if limit)
        yield _gauge("memory_budget_bytes", "The stated budget.", ["model", "tier"], limits)
        held = [
            ((s.model, owner, tier), usage)
            for s in self._snapshots
            for owner, tiers in s.ledger.items()
            for tier, usage in tiers.items()
        ]
        labels = ["model", "owner", "tier"]
        current = ((key, usage["current_bytes"]) for key, usage in held)
        yield _gauge("memory_bytes", "Bytes charged to an owner now.", labels, current)
        peak = ((key, usage["peak_bytes"]) for key, usage in held)
        yield _gauge("memory_peak_bytes", "Most bytes charged to an owner at once.", labels, peak)


_Samples = Iterable[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    made = GaugeMetricFamily(f"elbowroom_{name}", text, labels=labels)
    for key, value in samples:
        made.add_metric(list(key), value)
    return made


def _counter(name: str, text: str, labels: list[str], samples: _Samples) -> Metric:
    made = CounterMetricFamily(f"elbowroom_{name}", text, labels=labels)
    for key, value in samples:
        made.add_metric(list(key), value)
    return made
