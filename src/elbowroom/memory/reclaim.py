"""The one ladder of reclaimers: whoever can give up bytes, asked in a fixed order, between steps."""

from __future__ import annotations

from elbowroom.memory.base import Reclaimer


class ReclaimerLadder:
    """Asks its rungs one after the other; cheap, lossless rungs come first."""

    def __init__(self) -> None:
        self._rungs: list[Reclaimer] = []

    def add(self, reclaimer: Reclaimer) -> None:
        """Add a rung below the present ones."""
        self._rungs.append(reclaimer)

    def reclaimable(self) -> dict[str, int]:
        """Return the bytes that each rung could free (rungs of one name are added up)."""
        totals: dict[str, int] = {}
        for rung in self._rungs:
            totals[rung.name] = totals.get(rung.name, 0) + rung.reclaimable()
        return totals

    def relieve(self, num_bytes: int, lossless_only: bool = True) -> dict[str, int]:
        """Free at least ``num_bytes`` if possible; return the bytes that each asked rung really freed."""
        freed: dict[str, int] = {}
        missing = num_bytes
        for rung in self._rungs:
            if missing <= 0:
                break
            got = rung.reclaim(missing, lossless_only)
            freed[rung.name] = freed.get(rung.name, 0) + got
            missing -= got
        return freed
