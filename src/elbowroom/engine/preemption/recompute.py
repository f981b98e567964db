"""Preemption ``recompute``: what was stored is forgotten and computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class RecomputePreemption:
    """Needs no swap tier."""

    name: ClassVar[str] = "recompute"
    is_async: bool = False

    def saves(self, num_tokens: int, num_bytes: int, num_new_bytes: int) -> bool:
        """Return False."""
        return False

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Forget it."""
