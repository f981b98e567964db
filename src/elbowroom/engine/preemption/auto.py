"""Preemption ``auto``: whichever of saving and computing again takes less time, by measured costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapCosts:
    """What moving and computing take on this machine."""

    write_bytes_per_s: float = 5e8
    read_bytes_per_s: float = 1e9
    transfer_s: float = 1e-3
    """On top for each transfer."""
    prefill_tokens_per_s: float = 1000.0


@dataclass(slots=True)
class AutoPreemption:
    """FastSwitch always swaps, others always compute again; here each sequence takes what costs less.

    Transfers beside which others go on count as much as those that stop them: disk and memory are shared.
    """

    costs: SwapCosts = field(default_factory=SwapCosts)
    is_async: bool = True
    name: ClassVar[str] = "auto"

    def saves(self, num_tokens: int, num_bytes: int, num_new_bytes: int) -> bool:
        """Return whether writing what is new and reading all is faster than a prefill."""
        costs = self.costs
        moved_s = num_new_bytes / costs.write_bytes_per_s + num_bytes / costs.read_bytes_per_s + 2 * costs.transfer_s
        return moved_s < num_tokens / costs.prefill_tokens_per_s
