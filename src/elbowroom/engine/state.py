"""SchedulerState: everything of a scheduler that changes; copied whole by snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field

from elbowroom.engine.admission import ADMISSIONS, AdmissionPolicy
from elbowroom.engine.admission.lengths import Kind
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
    """Who may begin, of those that ask for no policy of their own."""
    order: OrderPolicy
    preemption: PreemptPolicy
    others: dict[str, AdmissionPolicy] = field(default_factory=dict)
    """Admission policies that requests have asked for instead, by name."""
    return_blocks: int = 1
    """Blocks for every running sequence that must be free before one comes back that had to go."""
    waiting: list[SeqState] = field(default_factory=list)
    running: list[SeqState] = field(default_factory=list)
    """Both in order of rank."""
    leaving: list[SeqState] = field(default_factory=list)
    """Sequences that are being saved: they hold their slots and get no rows."""
    next_order: int = 0
    now: float = 0.0
    """When the last step was planned, in seconds on the caller's clock."""
    num_steps: int = 0
    """Forward passes so far, repeated ones included."""
    refused: SeqState | None = None
    """The first that waits, while the admission policy's last refusal of it stands."""
    asks_again_at: int = 0
    """The step in which the policy is asked again about ``refused``, if no sequence ends before."""
    in_flight: Rows = field(default_factory=list)
    updates: list[SequenceUpdate] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)

    def admission_of(self, seq: SeqState) -> AdmissionPolicy:
        """Return the policy that is asked about ``seq``."""
        return self.others.get(seq.request.admission or "", self.admission)

    def use_admission(self, name: str | None) -> None:
        """Make the policy ``name`` if it is not there yet.

        Raises:
            PlanError: there is no such policy.
        """
        if name is not None and name != self.admission.name and name not in self.others:
            self.others[name] = ADMISSIONS.get(name)()

    def ended(self, seq: SeqState) -> None:
        """Tell all admission policies how long an answer was, whoever let it begin."""
        kind = Kind.of(seq.request.tenant, seq.num_prompt)
        for policy in (self.admission, *self.others.values()):
            policy.ended(kind, seq.num_generated)
