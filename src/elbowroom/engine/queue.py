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
    """Return the queue as ``tenant`` finds it.

    A request that was preempted does not wait to begin, nor does one that only came since the last step and has room:
    of a burst to an idle engine all may enter that can run at once, and as many as may wait.
    """
    stay = scheduler.queues[0][_num_beginning(scheduler) :]
    waiting = {seq.request.id: seq.request.tenant for seq in stay if not seq.num_generated}
    stats = scheduler.stats()
    return QueueView(
        num_waiting=len(waiting),
        num_waiting_of_tenant=sum(each == tenant for each in waiting.values()),
        num_running=stats.num_running,
        kv_used_bytes=stats.kv_used_bytes,
        kv_capacity_bytes=stats.kv_capacity_bytes,
    )


def _num_beginning(scheduler: Scheduler) -> int:
    """Return how many of those first in the queue have slots and room for their prompts, beside a block for each.

    Whether the admission policy lets them in shows in the next step; from then on its refusal counts.
    """
    waiting, running = scheduler.queues
    if scheduler.refuses_head:
        return 0
    left = scheduler.account.attainable_bytes() - sum([seq.pricing.block_bytes for seq in running])
    count = 0
    for seq in waiting[: max(scheduler.config.max_sequences - len(running), 0)]:
        left -= seq.pricing.admission(len(seq.tokens), (), 0, seq.num_generated)[1]
        if left < 0:
            break
        left -= seq.pricing.block_bytes
        count += 1
    return count
