"""Admission ``oracle``: knows how long each answer will be. Only traces tell; a bound for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import Kind
from elbowroom.engine.admission.peak import future_peak


@dataclass(slots=True)
class OracleAdmission:
    """The future peak of true lengths; where nobody knows one, its limit."""

    name: ClassVar[str] = "oracle"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 64
    guards: ClassVar[bool] = False

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether the peak fits."""
        outlooks = [*running, candidate]
        whole = [each.most_new_tokens if each.true_new_tokens is None else each.true_new_tokens for each in outlooks]
        more = np.asarray(whole, dtype=np.int64) - [each.num_generated for each in outlooks]
        return future_peak(outlooks, np.maximum(more, 0)) <= room_bytes

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Forget it."""
