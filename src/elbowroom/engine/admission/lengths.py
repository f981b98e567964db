"""LengthModel: how long answers get, learned from those that ended and those that still run.

A running sequence is a censored observation: its answer is longer than what it has. The survival function is that of
Kaplan and Meier (1958); with finished sequences alone, as published (Gong et al., ASPLOS 2025), the first ones to end
are the short ones, and long answers are underestimated until the window has filled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
WINDOW = 1000
"""Answers that are remembered."""


@dataclass(slots=True)
class LengthModel:
    """Lengths of the newest answers, in tokens."""

    finished: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _ended: tuple[Counts, Counts, Counts] | None = None
    """Lengths, ascending; how many ended at each; how many of those that ended were at least as long."""

    def add(self, num_tokens: int) -> None:
        """Note an answer that ended."""
        self.finished.append(num_tokens)
        self._ended = None

    def survival(self, running: Counts) -> tuple[Counts, npt.NDArray[np.float64]]:
        """Return lengths, ascending, and the share of answers that are longer than each of them.

        Args:
            running: int64 ``[n]``, tokens that unfinished answers have; they are longer than that.
        """
        if self._ended is None:
            lengths, deaths = np.unique(np.asarray(self.finished, dtype=np.int64), return_counts=True)
            self._ended = lengths, deaths, np.cumsum(deaths[::-1])[::-1]
        lengths, deaths, as_long = self._ended
        # Answers that ended at a length, and unfinished ones that have as many tokens, were at risk there.
        at_risk = as_long + running.size - np.sort(running).searchsorted(lengths, side="left")
        share: npt.NDArray[np.float64] = np.cumprod(1.0 - deaths / at_risk, dtype=np.float64)
        return lengths, share

    def draw(self, more_than: Counts, limits: Counts, running: Counts, ranks: npt.NDArray[np.float64]) -> Counts:
        """Return lengths of answers, given that each is longer than what it has, int64 of the shape of ``ranks``.

        Where nothing is known of answers so long, it is the limit.

        Args:
            more_than: int64 ``[n]``, tokens that the answers have.
            limits: int64 ``[n]``, tokens that they may have.
            running: int64 ``[m]``, tokens of all unfinished answers.
            ranks: float64 ``[n]`` or ``[guesses, n]`` from 0 to 1: which share of the possible lengths is shorter.
        """
        if not self.finished:
            return np.broadcast_to(limits, ranks.shape)
        lengths, survival = self.survival(running)
        before = np.concatenate([[1.0], survival])
        now = before[lengths.searchsorted(more_than, side="right")]
        # The smallest length beyond which at most (1 - rank) of those alive now go on.
        place = (-survival).searchsorted(-(1.0 - ranks) * now, side="left")
        known = (place < lengths.size) & (now > 0)
        drawn = np.where(known, lengths[np.minimum(place, lengths.size - 1)], limits)
        return np.clip(drawn, more_than + 1, np.maximum(limits, more_than + 1))
