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
        facts = [(each.num_generated, each.most_new_tokens, each.chunk_steps) for each in outlooks]
        has, limits, steps = np.asarray(facts, dtype=np.int64).T
        self._draws += 1
        generator = np.random.default_rng([self.seed, self._draws])
        ranks = generator.random((min(MOST_SETS, _DRAWS // len(outlooks) + 1), len(outlooks)))
        drawn = self.lengths.draw(has, limits, has[:-1], ranks)
        return future_peak(outlooks, drawn - has + steps) <= room_bytes * (1.0 - self.reserve)

    def ended(self, num_generated: int, most_new_tokens: int) -> None:
        """Remember its length; one that was cut off at its limit would have gone on, and still took so much."""
        self.lengths.add(num_generated)
