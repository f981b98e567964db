"""Admission ``greedy``: whoever fits now may begin; what does not fit later is preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import Kind


@dataclass(slots=True)
class GreedyAdmission:
    """As vLLM does; the scheduler itself keeps one block free for every running sequence."""

    name: ClassVar[str] = "greedy"
    looks_ahead: ClassVar[bool] = False
    patience: ClassVar[int] = 1
    guards: ClassVar[bool] = False

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return True."""
        return True

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Forget it."""
