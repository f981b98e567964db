"""The seam of object tiers: blobs under keys, written and read in the background, straight from and to memory.

A blob grows at its end (``append_at``) and is read in *parts*, each checked by itself. Nothing is copied on the way:
who asks for a transfer must leave the memory alone until it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Views = Sequence[memoryview]
"""Bytes of a part, in pieces as they lie in memory."""


class Part(NamedTuple):
    """A stretch of a blob, to be read into memory."""

    offset: int
    views: Views
    checksum: int
    """What writing it gave."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Outcome of one transfer."""

    ticket: int
    seconds: float
    """From its submission to its end."""
    num_bytes: int
    checksums: tuple[int, ...] = ()
    """Of a put, one for each part."""
    error: str | None = None
    """Why it failed. What a blob holds after a failed put, and memory after a failed get, is not defined."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What an object tier holds, in bytes of blobs."""

    num_objects: int
    used_bytes: int
    capacity_bytes: int


class ObjectTier(Protocol):
    """Keyed blobs; transfers are submitted at once and complete in ``poll``, those of one key in any order."""

    name: str

    def submit_put(self, key: str, parts: Sequence[Views], append_at: int = 0) -> int:
        """Start to write ``parts`` one behind the other from byte ``append_at`` on, where the blob ends then.

        Returns:
            a ticket.
        """

    def submit_get(self, key: str, parts: Sequence[Part]) -> int:
        """Start to read parts of a blob; return a ticket."""

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        """Return what has completed since the last call; wait so long for the first if anything is under way."""

    def contains(self, key: str) -> bool:
        """Return whether there is such a blob."""

    def delete(self, key: str) -> int:
        """Delete a blob that is not in transfer, if there is one; return its bytes."""

    def usage(self) -> TierUsage:
        """Return what is held."""

    def close(self) -> None:
        """Wait for what is under way and delete everything."""
