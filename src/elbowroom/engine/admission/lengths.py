"""LengthModel: how long answers get, learned from those that ended and those that still run.

A running sequence is a censored observation: its answer is longer than what it has. The survival function is that of
Kaplan and Meier (1958); with finished sequences alone, as published (Gong et al., ASPLOS 2025), the first ones to end
are the short ones, and long answers are underestimated until the window has filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW = 1000
"""Answers that are remembered."""


@dataclass(slots=True)
class LengthModel:
    """Lengths of the newest answers, in tokens."""

    finished: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, num_tokens: int) -> None:
        """Note an answer that ended."""
        self.finished.append(num_tokens)

    def survival(self, running: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return lengths, ascending, and the share of answers that are longer than each of them.

        Args:
            running: tokens that unfinished answers have; they are longer than that.
        """
        ended = np.asarray(self.finished, dtype=np.int64)
        lengths, deaths = np.unique(ended, return_counts=True)
        everyone = np.sort(np.concatenate([ended, np.asarray(running, dtype=np.int64)]))
        # Answers that ended at a length, and unfinished ones that have as many tokens, were at risk there.
        at_risk = everyone.size - np.searchsorted(everyone, lengths, side="left")
        share: npt.NDArray[np.float64] = np.cumprod(1.0 - deaths / at_risk, dtype=np.float64)
        return lengths, share

    def draw(
        self,
        more_than: npt.NDArray[np.int64],
        limits: npt.NDArray[np.int64],
        running: Sequence[int],
        ranks: npt.NDArray[np.float64],
    ) -> npt.NDArray[np.int64]:
        """Return lengths of answers, given that each is longer than what it has, int64 ``[n]``.

        Where nothing is known of answers so long, it is the limit.

        Args:
            more_than: int64 ``[n]``, tokens that the answers have.
            limits: int64 ``[n]``, tokens that they may have.
            running: tokens of all unfinished answers.
            ranks: float64 ``[n]`` from 0 to 1: which share of the possible lengths is shorter.
        """
        lengths, survival = self.survival(running)
        if not lengths.size:
            return limits.copy()
        before = np.concatenate([[1.0], survival])
        now = before[np.searchsorted(lengths, more_than, side="right")]
        # The smallest length beyond which at most (1 - rank) of those alive now go on.
        place = np.searchsorted(-survival, -(1.0 - ranks) * now, side="left")
        known = place < lengths.size
        drawn = np.where(known & (now > 0), lengths[np.minimum(place, lengths.size - 1)], limits)
        return np.clip(drawn, more_than + 1, np.maximum(limits, more_than + 1))
