"""Admission ``past_future``: lengths of past answers foretell the peak of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import LengthModel
from elbowroom.engine.admission.peak import bytes_over

_TIMES = 40
"""Moments of the future that are looked at, close together at first."""
_PRIOR = 4.0


@dataclass(slots=True)
class PastFutureAdmission:
    """Past-Future (Gong et al., ASPLOS 2025, arXiv 2507.10150), with chances in place of draws.

    The paper draws a length for every sequence, several times, and compares the highest peak with the room. Here each
    sequence is alive at each moment with the chance that its answer is that long, given what it has; the bytes of all
    have a mean and a standard deviation then, and a request begins if the mean and ``caution`` deviations fit at every
    moment. That is the same forecast without its noise, and asking again does not help a request that had bad luck.

    Running answers are censored observations (``LengthModel``), and a prior stands for what is not known yet, so no
    window has to be filled with the longest answer possible, which admits nothing for long (``past_future_paper``).
    """

    caution: float = 2.0
    lengths: LengthModel = field(default_factory=lambda: LengthModel(_PRIOR))
    name: ClassVar[str] = "past_future"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 8

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether all that will probably be held fits."""
        outlooks = [*running, candidate]
        facts = [(each.num_generated, each.most_new_tokens, each.chunk_steps) for each in outlooks]
        has, limits, chunks = np.asarray(facts, dtype=np.int64).T
        self.lengths.allow(int(limits.max()))
        furthest = max(int((limits - has + chunks).max()), 1)
        times = np.unique(np.rint(np.geomspace(1, furthest, _TIMES)).astype(np.int64))
        ahead = np.maximum(times - chunks[:, None], 0)
        alive = self.lengths.chances(has, limits, has[:-1], ahead)
        held = bytes_over(outlooks, times)
        mean = (alive * held).sum(axis=0)
        variance = (alive * (1.0 - alive) * held.astype(np.float64) ** 2).sum(axis=0)
        return bool((mean + self.caution * np.sqrt(variance) <= room_bytes).all())

    def ended(self, num_generated: int, most_new_tokens: int) -> None:
        """Remember its length; one that was cut off at its limit would have gone on, and still took so much."""
        self.lengths.add(num_generated)
