"""The seam of order: who is served first, who goes first when memory is short, and who is put out for whom."""

from __future__ import annotations

from typing import Protocol

from elbowroom.engine.sequence import SeqState

Rank = tuple[float, ...]
"""Place in the order of service: the smallest first. Ends with arrival number and sample, so no two are equal."""


class OrderPolicy(Protocol):
    """One dataclass, one file a policy. Whatever it remembers is part of the scheduler's state."""

    @property
    def name(self) -> str:
        """Name on the command line and in reports."""

    @property
    def interval(self) -> int:
        """Steps between two reviews of the order; 0: places do not change."""

    def rank(self, seq: SeqState, now: float) -> Rank:
        """Return the place of ``seq``; ``now`` in seconds on the clock of ``Request.arrival_s``."""

    def reviews(self, num_steps: int) -> bool:
        """Return whether ranks have changed, so that all are asked for anew before this step.

        Args:
            num_steps: forward passes so far.
        """

    def gives_way(self, running: SeqState, waiting: SeqState, now: float) -> bool:
        """Return whether ``running`` is put out when ``waiting`` does not fit beside it.

        A policy that says yes must not say so of the two the other way round soon after (no ping-pong).
        """

    def joined(self, seq: SeqState) -> None:
        """Note that a sequence was queued."""

    def served(self, seq: SeqState, num_prompt_tokens: int, num_generated: int) -> None:
        """Note tokens that a sequence got: of its prompt, once, those from the cache not counted; generated ones."""

    def left(self, seq: SeqState) -> None:
        """Note that a sequence ended."""
