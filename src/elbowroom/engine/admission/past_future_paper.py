"""Admission ``past_future_paper``: Past-Future as it was published, cold start included."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.past_future import MOST_SETS
from elbowroom.engine.admission.peak import future_peak

WINDOW = 200
"""Answers that are remembered (the paper's branch; the paper: 1,000)."""
_DRAWS = 200


@dataclass(slots=True)
class PastFuturePaperAdmission:
    """Lengths are drawn from a window of finished answers, of which half begins as the longest answer possible.

    A running answer gets a length from the window that is longer than what it has, with what it has below them and its
    limit above, interpolated at a uniform place; a candidate gets any. Beside ``past_future`` for comparison.
    """

    reserve: float = 0.05
    seed: int = 0
    window: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _draws: int = 0
    name: ClassVar[str] = "past_future_paper"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 1

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether the highest of some drawn peaks fits."""
        outlooks = [*running, candidate]
        if not self.window:
            self.window.extend([candidate.most_new_tokens] * (WINDOW // 2))
        self._draws += 1
        generator = np.random.default_rng([self.seed, self._draws])
        past, room = np.sort(np.asarray(self.window, dtype=np.int64)), room_bytes * (1.0 - self.reserve)
        for _ in range(min(MOST_SETS, _DRAWS // len(outlooks) + 1)):
            places = generator.random(len(outlooks))
            more = [_left(past, each, place) for each, place in zip(outlooks, places, strict=True)]
            if future_peak(outlooks, np.asarray(more, dtype=np.int64)) > room:
                return False
        return True

    def ended(self, num_generated: int, most_new_tokens: int) -> None:
        """Remember its length."""
        self.window.append(num_generated)


def _left(past: npt.NDArray[np.int64], outlook: Outlook, place: float) -> int:
    """Return how many tokens more an answer gets, drawn at ``place`` from 0 to 1."""
    has = outlook.num_generated
    if has == 0:
        return int(past[int(place * past.size)]) + outlook.chunk_steps
    longer = past[np.searchsorted(past, has, side="right") :]
    ends = [longer] if longer.size and longer[-1] >= outlook.most_new_tokens else [longer, [outlook.most_new_tokens]]
    known = np.concatenate([[has], *ends])
    drawn = float(np.interp(place * (known.size - 1), np.arange(known.size), known))
    return max(round(drawn) - has, 1) + outlook.chunk_steps
