"""Order ``slo``: by deadline. The first token is due so long behind the arrival, each further one so long behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elbowroom.engine.ordering.base import Rank
from elbowroom.engine.sequence import SeqState


@dataclass(slots=True)
class SloOrder:
    """Earliest deadline first, those that have missed theirs behind all others: they can only make more of them late.

    A sequence that runs and is ahead of its deadline by more than ``slack_s`` gives way to one that waits, is not late
    yet, and would be within ``urgent_s``.

    Args:
        ttft_s: seconds from arrival to the first token; a request's own ``deadline_s`` goes before.
        tpot_s: seconds between two tokens.
        slack_s: how far ahead of its deadline a sequence must be to give way.
        urgent_s: how near its deadline one must be to put others out.
        least_steps: steps that a sequence runs before it can be put out.
        interval: steps between two reviews of the order.
    """

    ttft_s: float = 10.0
    tpot_s: float = 0.5
    slack_s: float = 5.0
    urgent_s: float = 2.0
    least_steps: int = 16
    interval: int = 8
    _reviewed_at: int | None = None
    name: ClassVar[str] = "slo"

    def deadline_s(self, seq: SeqState) -> float:
        """Return when the next token is due, on the clock of ``Request.arrival_s``."""
        request = seq.request
        first = request.arrival_s + self.ttft_s if request.deadline_s is None else request.deadline_s
        return first + seq.num_generated * self.tpot_s

    def rank(self, seq: SeqState, now: float) -> Rank:
        """Return whether it is too late, the deadline and the arrival number."""
        deadline_s = self.deadline_s(seq)
        return (float(deadline_s < now and seq.num_generated == 0), deadline_s, seq.order, seq.sample)

    def reviews(self, num_steps: int) -> bool:
        """Return whether the last review is some steps old."""
        if self._reviewed_at is not None and num_steps < self._reviewed_at + self.interval:
            return False
        self._reviewed_at = num_steps
        return True

    def gives_way(self, running: SeqState, waiting: SeqState, now: float) -> bool:
        """Return whether the one that runs can wait and the other cannot."""
        due_s = self.deadline_s(waiting) - now
        if not 0 <= due_s <= self.urgent_s or running.num_steps_run < self.least_steps:
            return False
        return self.deadline_s(running) - now > self.slack_s + due_s

    def joined(self, seq: SeqState) -> None:
        """Forget it."""

    def served(self, seq: SeqState, num_prompt_tokens: int, num_generated: int) -> None:
        """Forget it."""

    def left(self, seq: SeqState) -> None:
        """Forget it."""
