"""The seam of preemption: is a sequence that has to go saved to the swap tier, or computed again later?"""

from __future__ import annotations

from typing import Protocol


class PreemptPolicy(Protocol):
    """One dataclass, one file a policy."""

    @property
    def name(self) -> str:
        """Name on the command line and in reports."""

    @property
    def is_async(self) -> bool:
        """Whether steps go on while tokens are written or read."""

    def saves(self, num_tokens: int, num_bytes: int, num_new_bytes: int) -> bool:
        """Return whether to save rather than to compute again.

        Args:
            num_tokens: computed tokens of the sequence.
            num_bytes: what it holds.
            num_new_bytes: those of them that the swap tier does not hold already.
        """

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Note that a step with prompts computed so many tokens."""
