"""Kernels: attention over KV strips, as readable torch (the oracle) and as native code."""

from elbowroom.kernels.attention import StripStep, StripTable, append, attend, backend_name
from elbowroom.kernels.base import LayerStrips, Tail

__all__ = ["LayerStrips", "StripStep", "StripTable", "Tail", "append", "attend", "backend_name"]
