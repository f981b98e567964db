"""SchedulerState: everything of a scheduler that changes; copied whole by snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field

from elbowroom.engine.admission.base import AdmissionPolicy
from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.ordering.base import OrderPolicy
from elbowroom.engine.preemption.base import PreemptPolicy
from elbowroom.engine.sequence import SeqState
from elbowroom.engine.types import Row, SchedulerStats, SequenceUpdate

Rows = list[tuple[SeqState, Row]]


@dataclass(slots=True)
class SchedulerState:
    """Books, policies with what they remember, and the sequences."""

    account: KVAccount
    admission: AdmissionPolicy
    order: OrderPolicy
    preemption: PreemptPolicy
    return_blocks: int = 1
    """Blocks for every running sequence that must be free before one comes back that had to go."""
    waiting: list[SeqState] = field(default_factory=list)
    running: list[SeqState] = field(default_factory=list)
    """Both in order of rank."""
    leaving: list[SeqState] = field(default_factory=list)
    """Sequences that are being saved: they hold their slots and get no rows."""
    next_order: int = 0
    num_steps: int = 0
    """Forward passes so far, repeated ones included."""
    refused: SeqState | None = None
    """The first that waits, while the admission policy's last refusal of it stands."""
    asks_again_at: int = 0
    """The step in which the policy is asked again about ``refused``, if no sequence ends before."""
    in_flight: Rows = field(default_factory=list)
    updates: list[SequenceUpdate] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
