"""Order ``priority``: the lowest number first; who came first among equals. A lower number puts out a higher one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elbowroom.engine.ordering.base import Rank
from elbowroom.engine.sequence import SeqState


@dataclass(slots=True)
class PriorityOrder:
    """By ``Request.priority``. Priorities do not change, so what was put out comes back only behind the other's end."""

    name: ClassVar[str] = "priority"
    interval: ClassVar[int] = 0

    def rank(self, seq: SeqState, now: float) -> Rank:
        """Return priority and arrival number."""
        return (seq.request.priority, seq.order, seq.sample)

    def reviews(self, num_steps: int) -> bool:
        """Return False: priorities do not change."""
        return False

    def gives_way(self, running: SeqState, waiting: SeqState, now: float) -> bool:
        """Return whether the one that waits has a lower number."""
        return waiting.request.priority < running.request.priority

    def joined(self, seq: SeqState) -> None:
        """Forget it."""

    def served(self, seq: SeqState, num_prompt_tokens: int, num_generated: int) -> None:
        """Forget it."""

    def left(self, seq: SeqState) -> None:
        """Forget it."""
