"""Admission ``past_future``: lengths of past answers foretell the peak of memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.admission.base import Outlook, Tokens
from elbowroom.engine.admission.lengths import Kind, LengthModel, Weights
from elbowroom.engine.admission.peak import bytes_over

_TIMES = 40
"""Moments of the future that are looked at, close together at first."""
_PRIOR = 4.0


@functools.lru_cache
def _moments(blocks: int) -> Tokens:
    """Return the steps ahead that are looked at, up to so many blocks of them, int64 ``[<= 40]``."""
    most = max(blocks, 1) * STRIP_TOKENS
    return np.unique(np.rint(np.geomspace(1, most, _TIMES)).astype(np.int64))


@dataclass(slots=True)
class PastFutureAdmission:
    """Past-Future (Gong et al., ASPLOS 2025, arXiv 2507.10150), with chances in place of draws.

    The paper draws a length for every sequence, several times, and compares the highest peak with the room. Here each
    sequence is alive at each moment with the chance that its answer is that long, given what it has and what is known
    of its kind; the bytes of all have a mean and a standard deviation then, and a request begins if the mean and a
    margin fit at every moment. That is the same forecast without its noise, and asking again does not help a request
    that had bad luck. The margin follows from what it costs (``_margin``), where the paper keeps a fixed share free.

    Running answers are censored observations (``LengthModel``), and a prior stands for what is not known yet, so no
    window has to be filled with the longest answer possible, which admits nothing for long (``past_future_paper``).
    """

    overflow: float = 1.0
    calm: float = 5.0
    patient_s: float = 5.0
    """A wait for the first token that is as good as none."""
    lengths: LengthModel = field(default_factory=lambda: LengthModel(_PRIOR))
    name: ClassVar[str] = "past_future"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 8
    guards: ClassVar[bool] = False

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether all that will probably be held fits."""
        outlooks = [*running, candidate]
        facts = [(each.num_generated, each.most_new_tokens, each.chunk_steps) for each in outlooks]
        has, limits, chunks = np.asarray(facts, dtype=np.int64).T
        self.lengths.allow(int(limits.max()))
        furthest = int((limits - has + chunks).max())
        times = _moments(-(-furthest // STRIP_TOKENS))
        ahead = np.maximum(times - chunks[:, None], 0)
        kinds = [each.kind for each in outlooks]
        alive = self.lengths.chances(kinds, has, limits, len(running), ahead)
        held = bytes_over(outlooks, times)
        mean = (alive * held).sum(axis=0)
        variance = (alive * (1.0 - alive) * held.astype(np.float64) ** 2).sum(axis=0)
        return bool((mean + self._margin(np.sqrt(variance), room_bytes, candidate.waited_s) <= room_bytes).all())

    def _margin(self, deviation: Weights, room_bytes: int, waited_s: float) -> Weights:
        """Return the bytes to keep free where what will be held is so uncertain.

        A margin of ``z`` deviations costs its share of the room all the time; an overflow, which comes with the chance
        that a normal variable is above ``z``, costs ``overflow`` rooms. The sum is least where the density at ``z`` is
        ``deviation / (overflow room)``. Room that is kept costs little while nobody has waited long: an overflow weighs
        ``calm`` times as much for one that has just come, and less as it waits.
        """
        ease = max(1.0 - waited_s / self.patient_s, 0.0)
        overflow = self.overflow * (1.0 + (self.calm - 1.0) * ease)
        scale = deviation * math.sqrt(2.0 * math.pi) / (overflow * max(room_bytes, 1))
        margin: Weights = deviation * np.sqrt(np.maximum(-2.0 * np.log(np.maximum(scale, 1e-300)), 0.0))
        return margin

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Remember its length; one that was cut off at its limit would have gone on, and still took so much."""
        self.lengths.add(kind, num_generated)
