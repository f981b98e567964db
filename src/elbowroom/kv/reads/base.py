"""The seam of read policies: how much of what is stored a decoding token reads, and in which layers.

What matters to a query is found by the kernels, from bounds on the keys of each strip (``kernels.digest``). Tokens of
prompts read everything.
"""

from __future__ import annotations

from typing import Protocol


class ReadPolicy(Protocol):
    """One dataclass, one file a policy; parameters are its fields."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def num_blocks(self) -> int:
        """Most strips that a KV head of a decoding token reads, the first and the newest among them."""

    @property
    def run_tokens(self) -> int:
        """Tokens that share bounds on their keys, where those are kept: a divisor of 64."""

    def selects(self, layer: int) -> bool:
        """Return whether tokens choose what they read in ``layer``, if it has no sliding window."""
