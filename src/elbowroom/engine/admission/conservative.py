"""Admission ``conservative``: a request begins when all that run, and it, fit at their limits. None is preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.admission.lengths import Kind
from elbowroom.engine.admission.peak import future_peak


@dataclass(slots=True)
class ConservativeAdmission:
    """As TensorRT-LLM's GUARANTEED_NO_EVICT: every answer may become as long as its limit."""

    name: ClassVar[str] = "conservative"
    looks_ahead: ClassVar[bool] = True
    patience: ClassVar[int] = 64
    guards: ClassVar[bool] = True

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether the peak at all limits fits."""
        outlooks = [*running, candidate]
        more = np.asarray([each.most_new_tokens - each.num_generated for each in outlooks], dtype=np.int64)
        return future_peak(outlooks, np.maximum(more, 0)) <= room_bytes

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Forget it."""
