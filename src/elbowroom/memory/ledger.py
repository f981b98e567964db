"""Budget and Ledger: how many bytes each tier may hold, and who holds them now.

Every large allocation of Elbowroom is charged here under an owner's name *before* it is made. A refusal lists the
owners and says what to lower. The ledger knows nothing of addresses; ``arena`` does.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypedDict

from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.units import format_bytes


class Usage(TypedDict):
    """Bytes of one owner in one tier."""

    current_bytes: int
    peak_bytes: int


class Budget:
    """Upper bounds in bytes for each memory tier; may be changed while running.

    Args:
        limits: tier name -> bytes. A tier that is not named is unlimited.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)

    def limit(self, tier: str) -> int | None:
        """Return the bytes that ``tier`` may hold; None means no bound."""
        return self._limits.get(tier)

    def set(self, tier: str, num_bytes: int) -> None:
        """Change a bound; what is already charged above it is given up by the reclaimers between steps."""
        self._limits[tier] = num_bytes


class Ledger:
    """Charges bytes to owners, tier by tier, and refuses what the budget does not hold."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._usage: dict[tuple[str, str], Usage] = {}
        self._totals: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    def charge(self, owner: str, tier: str, num_bytes: int) -> None:
        """Charge ``num_bytes`` of ``tier`` to ``owner``.

        Raises:
            OutOfBudget: the tier's bound would be exceeded; nothing is charged then.
        """
        if not self.try_charge(owner, tier, num_bytes):
            raise self.refusal(owner, tier, num_bytes)

    def try_charge(self, owner: str, tier: str, num_bytes: int) -> bool:
        """Charge and return True, or return False and change nothing."""
        _check_amount(owner, num_bytes)
        with self._lock:
            limit, total = self.budget.limit(tier), self._totals.get(tier, 0)
            if limit is not None and num_bytes > 0 and total + num_bytes > limit:
                return False
            self._add(owner, tier, num_bytes)
            return True

    def release(self, owner: str, tier: str, num_bytes: int) -> None:
        """Take ``num_bytes`` off ``owner``'s account.

        Raises:
            IntegrityError: more than the owner holds, or less than nothing.
        """
        _check_amount(owner, num_bytes)
        with self._lock:
            self._add(owner, tier, -num_bytes)

    def transfer(self, source: str, target: str, tier: str, num_bytes: int) -> None:
        """Move a charge between owners; the tier's total stays.

        Raises:
            IntegrityError: more than ``source`` holds, or less than nothing.
        """
        _check_amount(source, num_bytes)
        with self._lock:
            self._add(source, tier, -num_bytes)
            self._add(target, tier, num_bytes)

    def available(self, tier: str) -> int | None:
        """Return the bytes that could still be charged (negative after a lowered budget); None means no bound."""
        limit = self.budget.limit(tier)
        return None if limit is None else limit - self.total(tier)

    def total(self, tier: str) -> int:
        """Return the bytes charged to ``tier`` now."""
        return self._totals.get(tier, 0)

    def peak(self, tier: str) -> int:
        """Return the most bytes that were charged to ``tier`` at once."""
        return self._peaks.get(tier, 0)

    def held(self, owner: str, tier: str) -> int:
        """Return the bytes charged to ``owner`` in ``tier`` now."""
        usage = self._usage.get((owner, tier))
        return 0 if usage is None else usage["current_bytes"]

    def snapshot(self) -> dict[str, dict[str, Usage]]:
        """Return ``{owner: {tier: {current_bytes, peak_bytes}}}``."""
        result: dict[str, dict[str, Usage]] = {}
        with self._lock:
            for (owner, tier), usage in sorted(self._usage.items()):
                result.setdefault(owner, {})[tier] = usage.copy()
        return result

    def refusal(self, owner: str, tier: str, num_bytes: int) -> OutOfBudget:
        """Return the error that explains why ``num_bytes`` for ``owner`` do not fit."""
        limit = self.budget.limit(tier) or 0
        with self._lock:
            holders = sorted(
                ((usage["current_bytes"], name) for (name, where), usage in self._usage.items() if where == tier),
                reverse=True,
            )
        listed = ", ".join(f"{name} {format_bytes(held)}" for held, name in holders if held) or "nobody yet"
        biggest = holders[0][1] if holders else owner
        return OutOfBudget(
            f"{owner} asked for {format_bytes(num_bytes)} of {tier} memory; "
            f"{format_bytes(max(limit - self.total(tier), 0))} of {format_bytes(limit)} are free. Held by: {listed}",
            f"raise memory= (--memory), or lower what {biggest} needs (fewer or shorter sequences, a smaller dtype)",
        )

    def _add(self, owner: str, tier: str, num_bytes: int) -> None:
        usage = self._usage.setdefault((owner, tier), Usage(current_bytes=0, peak_bytes=0))
        if usage["current_bytes"] + num_bytes < 0:
            raise IntegrityError(f"{owner} gives back {-num_bytes} bytes of {tier}, holds {usage['current_bytes']}")
        usage["current_bytes"] += num_bytes
        usage["peak_bytes"] = max(usage["peak_bytes"], usage["current_bytes"])
        total = self._totals.get(tier, 0) + num_bytes
        self._totals[tier] = total
        self._peaks[tier] = max(self._peaks.get(tier, 0), total)


def _check_amount(owner: str, num_bytes: int) -> None:
    if num_bytes < 0:
        raise IntegrityError(f"an amount of {num_bytes} bytes for {owner} is below zero")
