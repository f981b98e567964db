"""Bytes have one owner: budget, ledger, arenas of memory tiers, reclaimers, and the meter that checks them."""

from elbowroom.memory.arena import Arena, Range
from elbowroom.memory.base import Completion, Mapping, MemoryTier, ObjectTier, Reclaimer
from elbowroom.memory.ledger import Budget, Ledger, Usage
from elbowroom.memory.meter import Meter
from elbowroom.memory.reclaim import ReclaimerLadder
from elbowroom.memory.tiers import DeviceTier, HostTier
from elbowroom.memory.workspace import Workspace

__all__ = [
    "Arena",
    "Budget",
    "Completion",
    "DeviceTier",
    "HostTier",
    "Ledger",
    "Mapping",
    "MemoryTier",
    "Meter",
    "ObjectTier",
    "Range",
    "Reclaimer",
    "ReclaimerLadder",
    "Usage",
    "Workspace",
]
