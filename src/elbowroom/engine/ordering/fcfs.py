"""Order ``fcfs``: first come, first served. Nobody is put out for somebody who came later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elbowroom.engine.ordering.base import Rank
from elbowroom.engine.sequence import SeqState


@dataclass(slots=True)
class FcfsOrder:
    """By arrival; priorities do not count."""

    name: ClassVar[str] = "fcfs"
    interval: ClassVar[int] = 0

    def rank(self, seq: SeqState, now: float) -> Rank:
        """Return the arrival number."""
        return (seq.order, seq.sample)

    def reviews(self, num_steps: int) -> bool:
        """Return False: arrival does not change."""
        return False

    def gives_way(self, running: SeqState, waiting: SeqState, now: float) -> bool:
        """Return False."""
        return False

    def joined(self, seq: SeqState) -> None:
        """Forget it."""

    def served(self, seq: SeqState, num_prompt_tokens: int, num_generated: int) -> None:
        """Forget it."""

    def left(self, seq: SeqState) -> None:
        """Forget it."""
