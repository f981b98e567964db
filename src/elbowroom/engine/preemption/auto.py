"""Preemption ``auto``: whichever of saving and computing again takes less time, by measured costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elbowroom.memory.swap_cost import SwapCost

_MEMORY = 0.9
"""Weight of what was known of the speed of prefills when a step of one is measured."""


@dataclass(slots=True)
class AutoPreemption:
    """FastSwitch always swaps, others always compute again; here each sequence takes what costs less.

    Transfers beside which others go on count as much as those that stop them: disk and memory are shared.

    Args:
        cost: of bytes, measured at the start.
        prefill_tokens_per_s: a first guess; steps that read prompts tell better.
    """

    cost: SwapCost
    prefill_tokens_per_s: float = 1000.0
    is_async: bool = True
    name: ClassVar[str] = "auto"

    def saves(self, num_tokens: int, num_bytes: int, num_new_bytes: int) -> bool:
        """Return whether writing what is new and reading all is faster than a prefill."""
        moved_s = self.cost.write_seconds(num_new_bytes, 1) + self.cost.read_seconds(num_bytes, 1)
        return moved_s < num_tokens / self.prefill_tokens_per_s

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Learn how fast prompts are read."""
        measured = num_tokens / seconds
        self.prefill_tokens_per_s += (1.0 - _MEMORY) * (measured - self.prefill_tokens_per_s)
