"""Capacity: the bytes that one or several pool sets may hold together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class Holder(Protocol):
    """Whoever holds bytes."""

    @property
    def live_bytes(self) -> int:
        """Bytes held now."""


@dataclass(slots=True, eq=False)
class Capacity:
    """Stores of one engine, one for each of its plans, share it."""

    num_bytes: int
    """Most bytes of pages to hold."""
    holders: list[Holder] = field(default_factory=list)

    @property
    def live_bytes(self) -> int:
        """Bytes that all of them hold."""
        return sum([holder.live_bytes for holder in self.holders])
