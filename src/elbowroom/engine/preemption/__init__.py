"""Preemption policies by name: what becomes of the KV cache of a sequence that has to go."""

from collections.abc import Callable

from elbowroom.engine.preemption.base import PreemptPolicy
from elbowroom.registry import Registry

PREEMPTIONS: Registry[Callable[..., PreemptPolicy]] = Registry(
    "preemption policy",
    {
        "recompute": "elbowroom.engine.preemption.recompute:RecomputePreemption",
        "swap": "elbowroom.engine.preemption.swap:SwapPreemption",
        "auto": "elbowroom.engine.preemption.auto:AutoPreemption",
    },
)

__all__ = ["PREEMPTIONS", "PreemptPolicy"]
