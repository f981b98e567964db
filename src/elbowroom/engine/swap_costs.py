"""SwapCosts: is it quicker to write a sequence away and read it back, or to compute it again? From what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from elbowroom.engine.core import StepTimes
from elbowroom.memory.swap_cost import SwapCost


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """What giving up memory costs, either way."""

    swap: SwapCost
    prefill_token_s: float
    """Seconds to compute a token of a prompt again."""

    @classmethod
    def of(cls, swap: SwapCost, times: StepTimes, guess_token_s: float = 1e-3) -> SwapCosts:
        """Return the costs after the steps so far; ``guess_token_s`` counts until a prompt has been read."""
        known = times.prefill_tokens > 0
        return cls(swap, times.prefill_s / times.prefill_tokens if known else guess_token_s)

    def swap_seconds(self, num_bytes: float, num_copies: float = 1, new_bytes: float | None = None) -> float:
        """Return the seconds of writing a sequence and reading it back; ``new_bytes``: what its object lacks."""
        written = num_bytes if new_bytes is None else new_bytes
        return self.swap.write_seconds(written, num_copies) + self.swap.read_seconds(num_bytes, num_copies)

    def recompute_seconds(self, num_tokens: float) -> float:
        """Return the seconds of computing a sequence again."""
        return num_tokens * self.prefill_token_s

    def swaps(self, num_tokens: float, num_bytes: float, num_copies: float = 1, new_bytes: float | None = None) -> bool:
        """Return whether swapping is quicker."""
        return self.swap_seconds(num_bytes, num_copies, new_bytes) < self.recompute_seconds(num_tokens)
