"""Preemption ``swap``: what was stored goes to the swap tier and comes back from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class SwapPreemption:
    """FastSwitch (Shen et al., 2024, arXiv 2411.18424): while it is written or read, the other sequences go on."""

    is_async: bool = True
    name: ClassVar[str] = "swap"

    def saves(self, num_tokens: int, num_bytes: int, num_new_bytes: int) -> bool:
        """Return True."""
        return True

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Forget it."""
