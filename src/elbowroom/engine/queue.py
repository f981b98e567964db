"""QueueView: what an engine's queue holds when a request asks to enter, for whoever limits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elbowroom.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class QueueView:
    """Requests that wait to begin, and what those that run hold. Several prompts are several requests."""

    num_waiting: int
    num_waiting_of_tenant: int
    """Of the tenant who asks to enter."""
    num_running: int
    """Sequences."""
    kv_used_bytes: int
    kv_capacity_bytes: int


Gate = Callable[[QueueView], None]
"""Raises Overloaded where one more request is too many; called on the engine's thread."""


def view_queue(scheduler: Scheduler, tenant: str) -> QueueView:
    """Return the queue as ``tenant`` finds it; a request that was preempted does not wait to begin."""
    waiting = {seq.request.id: seq.request.tenant for seq in scheduler.queues[0] if not seq.num_generated}
    stats = scheduler.stats()
    return QueueView(
        num_waiting=len(waiting),
        num_waiting_of_tenant=sum(each == tenant for each in waiting.values()),
        num_running=stats.num_running,
        kv_used_bytes=stats.kv_used_bytes,
        kv_capacity_bytes=stats.kv_capacity_bytes,
    )
