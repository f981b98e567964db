"""Keys and values: the plan, the store, its codecs."""

from elbowroom.kv.base import AttnOut, KVHandle, KVReport, KVStep, KVStore, Shortfall, Want
from elbowroom.kv.bound import BoundPlan, KVCurve
from elbowroom.kv.contiguous import ContiguousStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan

__all__ = [
    "AttnOut",
    "BoundPlan",
    "ContiguousStore",
    "KVCurve",
    "KVHandle",
    "KVPlan",
    "KVReport",
    "KVStep",
    "KVStore",
    "PagedStore",
    "Shortfall",
    "Want",
]
