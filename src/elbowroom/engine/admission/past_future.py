"""Admission ``past_future``: lengths of past answers foretell the peak of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import LengthModel
from elbowroom.engine.admission.peak import future_peak

MOST_SETS = 5
"""Times that lengths are drawn for a decision; the highest peak counts."""
_DRAWS = 200


@dataclass(slots=True)
class PastFutureAdmission:
    """Past-Future (Gong et al., ASPLOS 2025, arXiv 2507.10150), with unfinished answers as observations.

    Each decision draws how long every running answer will get, given what it has, and how long the candidate's; a
    request begins if the peak of what all will hold stays below the room less ``reserve``.

    Deviation from the paper: running answers are censored observations (``LengthModel``), so no window has to be filled
    with guesses at the start; as published the longest answer possible is guessed, and nothing is admitted for long
    (``past_future_paper``).
    """

    reserve: float = 0.05
    seed: int = 0
    lengths: LengthModel = field(default_factory=LengthModel)
    _draws: int = 0
    name: ClassVar[str] = "past_future"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 8

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether the highest of some drawn peaks fits."""
        outlooks = [*running, candidate]
        has = np.asarray([each.num_generated for each in outlooks], dtype=np.int64)
        limits = np.asarray([each.most_new_tokens for each in outlooks], dtype=np.int64)
        steps = np.asarray([each.chunk_steps for each in outlooks], dtype=np.int64)
        self._draws += 1
        generator = np.random.default_rng([self.seed, self._draws])
        room = room_bytes * (1.0 - self.reserve)
        for _ in range(min(MOST_SETS, _DRAWS // len(outlooks) + 1)):
            drawn = self.lengths.draw(has, limits, has[:-1].tolist(), generator.random(len(outlooks)))
            if future_peak(outlooks, drawn - has + steps) > room:
                return False
        return True

    def ended(self, num_generated: int, most_new_tokens: int) -> None:
        """Remember its length; one that was cut off at its limit would have gone on, and still took so much."""
        self.lengths.add(num_generated)
