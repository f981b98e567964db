"""Order ``fair``: the tenant that got least is served first (virtual token counters; Sheng et al., OSDI 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from elbowroom.engine.ordering.base import Rank
from elbowroom.engine.sequence import SeqState


@dataclass(slots=True)
class FairOrder:
    """Each tenant has a counter of the tokens that it got, prompt tokens and generated ones at their weights.

    A tenant that was away does not save up: when it comes back its counter is raised to the least of those present.
    Unlike the published scheduler, which only chooses whom to admit, this one puts running sequences out for a tenant
    that got less by ``quantum`` and more; a sequence that runs keeps its slot for ``least_steps``. So two tenants
    take turns of at least a quantum, and none of them is put out again at once.

    Args:
        prompt_weight: cost of a prompt token that is computed.
        output_weight: cost of a generated token.
        quantum: how much more a tenant must have got before its sequences are put out for another's.
        least_steps: steps that a sequence runs before it can be put out.
        interval: steps between two reviews of the order.
        weights: of tenants; one of weight 2 may have twice as much as one of weight 1, the default.
    """

    prompt_weight: float = 1.0
    output_weight: float = 2.0
    quantum: float = 256.0
    least_steps: int = 16
    interval: int = 8
    weights: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    """What each tenant got, by its weight."""
    present: dict[str, int] = field(default_factory=dict)
    """Sequences of each tenant that wait or run."""
    _reviewed_at: int | None = None
    _is_stale: bool = False
    name: ClassVar[str] = "fair"

    def rank(self, seq: SeqState, now: float) -> Rank:
        """Return the tenant's counter and the arrival number."""
        return (self.counters.get(seq.request.tenant, 0.0), seq.order, seq.sample)

    def reviews(self, num_steps: int) -> bool:
        """Return whether counters have moved and the last review is some steps old, or somebody joined or left."""
        before = self._reviewed_at
        if before is not None and not self._is_stale and num_steps < before + self.interval:
            return False
        self._reviewed_at, self._is_stale = num_steps, False
        return True

    def gives_way(self, running: SeqState, waiting: SeqState, now: float) -> bool:
        """Return whether the tenant of ``running`` got more by a quantum, and ``running`` had its turn."""
        ahead = self.counters.get(running.request.tenant, 0.0) - self.counters.get(waiting.request.tenant, 0.0)
        return ahead > self.quantum and running.num_steps_run >= self.least_steps

    def joined(self, seq: SeqState) -> None:
        """Raise the counter of a tenant that comes back to the least of those present."""
        tenant = seq.request.tenant
        if tenant not in self.present:
            least = min([self.counters[other] for other in self.present], default=self.counters.get(tenant, 0.0))
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)
        self.present[tenant] = self.present.get(tenant, 0) + 1
        self._is_stale = True

    def served(self, seq: SeqState, num_prompt_tokens: int, num_generated: int) -> None:
        """Charge the tenant."""
        tenant = seq.request.tenant
        cost = num_prompt_tokens * self.prompt_weight + num_generated * self.output_weight
        self.counters[tenant] = self.counters.get(tenant, 0.0) + cost / self.weights.get(tenant, 1.0)

    def left(self, seq: SeqState) -> None:
        """Forget the sequence, and a tenant without any once its counter tells nothing."""
        tenant = seq.request.tenant
        self.present[tenant] -= 1
        self._is_stale = True
        if self.present[tenant] == 0:
            del self.present[tenant]
            floor = min([self.counters[other] for other in self.present], default=float("inf"))
            self.counters = {
                name: count for name, count in self.counters.items() if name in self.present or count > floor
            }
