"""Seams of memory/: what a tier must do, and what a holder of reclaimable bytes must do.

A *memory tier* gives address space whose pages can be made resident and given back (device, host).
An *object tier*, which stores blobs under keys (disk, remote), is described in ``objects``.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Mapping(Protocol):
    """One piece of address space of a memory tier."""

    base: Tensor
    """uint8 ``[virtual_bytes]`` over the whole space; untouched pages cost nothing where the tier is elastic."""

    def decommit(self, start_byte: int, stop_byte: int) -> None:
        """Give the pages of ``[start_byte, stop_byte)`` back; they read as zero and cost nothing until touched."""

    def close(self) -> None:
        """Give everything back; ``base`` must not be used afterwards."""


class MemoryTier(Protocol):
    """Directly addressable memory."""

    name: str
    page_bytes: int
    elastic: bool
    """Whether pages become resident on first touch and can be given back one by one."""

    def allocate(self, virtual_bytes: int) -> Mapping:
        """Return address space of ``virtual_bytes``."""


class Reclaimer(Protocol):
    """Somebody who holds bytes that can be given up (prefix cache, parked sequences, weights)."""

    name: str

    def reclaimable(self) -> int:
        """Return the bytes that ``reclaim`` could free now."""

    def reclaim(self, num_bytes: int, lossless_only: bool) -> int:
        """Free at least ``num_bytes`` if possible and return the bytes really freed; called between steps only."""
