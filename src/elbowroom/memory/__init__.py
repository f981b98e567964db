"""Bytes have one owner: budget, ledger, arenas of memory tiers, reclaimers, and the meter that checks them."""

from elbowroom.memory.arena import Arena, Range
from elbowroom.memory.base import Mapping, MemoryTier, Reclaimer
from elbowroom.memory.disk import DiskTier
from elbowroom.memory.ledger import Budget, Ledger, Usage
from elbowroom.memory.meter import Meter
from elbowroom.memory.objects import Completion, ObjectTier, Part, TierUsage
from elbowroom.memory.reclaim import ReclaimerLadder
from elbowroom.memory.tiers import DeviceTier, HostTier
from elbowroom.memory.workspace import Workspace

__all__ = [
    "Arena",
    "Budget",
    "Completion",
    "DeviceTier",
    "DiskTier",
    "HostTier",
    "Ledger",
    "Mapping",
    "MemoryTier",
    "Meter",
    "ObjectTier",
    "Part",
    "Range",
    "Reclaimer",
    "ReclaimerLadder",
    "TierUsage",
    "Usage",
    "Workspace",
]
