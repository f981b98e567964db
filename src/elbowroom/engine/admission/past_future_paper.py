"""Admission ``past_future_paper``: Past-Future as it was published, cold start included."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import Counts, Kind
from elbowroom.engine.admission.peak import future_peak

WINDOW = 200
"""Answers that are remembered (the paper's branch; the paper: 1,000)."""
MOST_SETS = 5
"""Times that lengths are drawn for a decision; the highest peak counts."""
_DRAWS = 200


@dataclass(slots=True)
class PastFuturePaperAdmission:
    """Lengths are drawn from a window of finished answers, of which half begins as the longest answer possible.

    A running answer gets a length from the window that is longer than what it has, with what it has below them and its
    limit above, interpolated at a uniform place; a candidate gets any. Who was refused asks again after six steps, as
    often as LightLLM, whose scheduler this is, schedules by default. Beside ``past_future`` for comparison.
    """

    reserve: float = 0.05
    seed: int = 0
    window: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _draws: int = 0
    name: ClassVar[str] = "past_future_paper"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 6
    guards: ClassVar[bool] = False

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether the highest of some drawn peaks fits."""
        outlooks = [*running, candidate]
        if not self.window:
            self.window.extend([candidate.most_new_tokens] * (WINDOW // 2))
        self._draws += 1
        generator = np.random.default_rng([self.seed, self._draws])
        facts = [(each.num_generated, each.most_new_tokens, each.chunk_steps) for each in outlooks]
        has, limits, steps = np.asarray(facts, dtype=np.int64).T
        places = generator.random((min(MOST_SETS, _DRAWS // len(outlooks) + 1), len(outlooks)))
        more = _left(np.sort(np.asarray(self.window, dtype=np.int64)), has, limits, places) + steps
        return future_peak(outlooks, more) <= room_bytes * (1.0 - self.reserve)

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Remember its length."""
        self.window.append(num_generated)


def _left(past: Counts, has: Counts, limits: Counts, places: npt.NDArray[np.float64]) -> Counts:
    """Return how many tokens more answers get, drawn at ``places`` from 0 to 1, int64 of their shape.

    Args:
        past: int64 ``[window]``, ascending.
        has: int64 ``[n]``, tokens that the answers have.
        limits: int64 ``[n]``, tokens that they may have.
        places: float64 ``[guesses, n]``.
    """
    first = past.searchsorted(has, side="right")
    longer = past.size - first
    # What it has, then what is longer, then the limit where that is longer still.
    knots = longer + (past[-1] < limits)
    place = places * knots
    low = place.astype(np.int64)

    def knot(number: Counts) -> Counts:
        inside = past[np.clip(first + number - 1, 0, past.size - 1)]
        return np.where(number == 0, has, np.where(number <= longer, inside, limits))

    drawn = knot(low) + (place - low) * (knot(np.minimum(low + 1, knots)) - knot(low))
    fresh = past[(places * past.size).astype(np.int64)]
    return np.where(has == 0, fresh, np.maximum(np.rint(drawn).astype(np.int64) - has, 1))
