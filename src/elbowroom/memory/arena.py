"""Arena: address ranges of one tier whose resident pages are charged, page by page, to owners.

A page is *live* (some extent covers it; charged to the range's owner), *free* (nothing covers it but it is still
resident; charged to ``arena.free``) or *absent* (costs nothing). Freed pages stay resident so that the next
allocation need not fault them in; ``trim`` gives them back once idle, and any charge that would otherwise be refused
gives them back first.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.errors import IntegrityError
from elbowroom.memory.base import MemoryTier
from elbowroom.memory.ledger import Ledger

FREE_OWNER = "arena.free"
IDLE_S = 0.5
"""Seconds after which a free page is given back to the operating system."""

_FEW_PAGES = 4096
"""Up to here a list of freed pages is left as it is."""

Offsets = npt.NDArray[np.int64]


class Range:
    """Address space of an arena with page-exact accounting; made by ``Arena.reserve``.

    Extents given to ``commit`` may share pages; a page is charged while any extent covers it.
    """

    def __init__(self, arena: Arena, owner: str, virtual_bytes: int) -> None:
        self.owner = owner
        self._arena = arena
        self._page = arena.tier.page_bytes
        num_pages = arena.num_pages(virtual_bytes)
        self.virtual_bytes = num_pages * self._page
        self._mapping = arena.tier.allocate(self.virtual_bytes)
        # numpy takes zeroed memory lazily: pages that were never used cost no metadata either.
        self._covers = np.zeros(num_pages, dtype=np.int32)
        self._resident = np.zeros(num_pages, dtype=bool)
        self._freed_at = np.zeros(num_pages, dtype=np.float64)
        self._top = 0
        """No page from here on was ever committed."""
        self._freed: list[tuple[float, Offsets]] = []
        """When pages became free, and which: the oldest first. Some are in use again, or were given back."""
        self._num_noted = 0
        """Pages in that list."""
        self._num_live = 0
        self._num_free = 0
        if not arena.tier.elastic:
            self._resident[:] = True
            self._num_free = num_pages

    @property
    def base(self) -> Tensor:
        """uint8 tensor over the whole range."""
        return self._mapping.base

    @property
    def live_bytes(self) -> int:
        """Bytes of pages that some extent covers."""
        return self._num_live * self._page

    @property
    def free_bytes(self) -> int:
        """Bytes of resident pages that no extent covers."""
        return self._num_free * self._page

    def cost(self, starts: Offsets, extent_bytes: int) -> int:
        """Return the bytes by which committing these extents would raise ``live_bytes``."""
        pages = np.unique(self._pages(starts, extent_bytes))
        return int(np.count_nonzero(self._covers[pages] == 0)) * self._page

    def commit(self, starts: Offsets, extent_bytes: int) -> None:
        """Charge the pages under ``[start, start + extent_bytes)`` for every start.

        Raises:
            OutOfBudget: they do not fit, even if all free pages were given back; nothing changes then.
        """
        pages, counts = np.unique(self._pages(starts, extent_bytes), return_counts=True)
        if pages.size == 0:
            return
        dead = pages[self._covers[pages] == 0]
        free = dead[self._resident[dead]]
        absent = dead[~self._resident[dead]]
        self._arena.charge(self.owner, absent.size * self._page, keep=(self, free))
        self._arena.transfer(FREE_OWNER, self.owner, free.size * self._page)
        self._covers[pages] += counts.astype(np.int32)
        self._resident[absent] = True
        self._num_live += dead.size
        self._num_free -= free.size
        self._top = max(self._top, int(pages[-1]) + 1)

    def decommit(self, starts: Offsets, extent_bytes: int) -> int:
        """Take extents away; pages that nothing covers any more become free (resident until trimmed).

        Returns:
            bytes of those pages: what ``live_bytes`` went down by.

        Raises:
            IntegrityError: some page is not covered that often; nothing changes then.
        """
        pages, counts = np.unique(self._pages(starts, extent_bytes), return_counts=True)
        if (self._covers[pages] < counts).any():
            raise IntegrityError(f"{self.owner} gives back an extent that it does not hold")
        self._covers[pages] -= counts.astype(np.int32)
        freed = pages[self._covers[pages] == 0]
        self._note_freed(freed)
        self._num_live -= freed.size
        self._num_free += freed.size
        self._arena.transfer(self.owner, FREE_OWNER, freed.size * self._page)
        return int(freed.size) * self._page

    def trim(self, before: float, except_pages: Offsets | None = None) -> int:
        """Give back free pages that were freed at ``before`` or earlier; return their bytes."""
        if not self._arena.tier.elastic or self._num_free == 0:
            return 0
        count = bisect.bisect_right(self._freed, before, key=lambda each: each[0])
        if count == 0:
            return 0
        noted = np.unique(np.concatenate([pages for _, pages in self._freed[:count]]))
        # Pages may be in use again, or have been freed once more since.
        idle = self._resident[noted] & (self._covers[noted] == 0) & (self._freed_at[noted] <= before)
        kept = noted[:0] if except_pages is None else np.intersect1d(noted[idle], except_pages, assume_unique=True)
        pages = np.setdiff1d(noted[idle], kept, assume_unique=True)
        self._freed = [(self._freed[count - 1][0], kept)] * bool(kept.size) + self._freed[count:]
        self._num_noted = sum(each.size for _, each in self._freed)
        if pages.size == 0:
            return 0
        for run in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
            self._mapping.decommit(int(run[0]) * self._page, (int(run[-1]) + 1) * self._page)
        self._resident[pages] = False
        self._num_free -= pages.size
        self._arena.ledger.release(FREE_OWNER, self._arena.tier.name, pages.size * self._page)
        return int(pages.size) * self._page

    def resident_bytes(self, start_byte: int, stop_byte: int) -> int:
        """Return the bytes of resident pages in a part of the range that begins and ends with a page."""
        part = self._resident[start_byte // self._page : stop_byte // self._page]
        return int(np.count_nonzero(part)) * self._page

    def check(self, starts: Offsets, extent_bytes: int) -> None:
        """Raise IntegrityError unless exactly these extents are committed and the page counts agree."""
        pages, covers = np.unique(self._pages(starts, extent_bytes), return_counts=True)
        num_live, num_covered = int(pages.size), int(np.count_nonzero(self._covers[: self._top]))
        if num_covered != num_live or not np.array_equal(covers, self._covers[pages]):
            raise IntegrityError(f"pages of {self.owner} are covered by other extents than the ones held")
        top = self._top if self._arena.tier.elastic else self._resident.size
        num_free = int(np.count_nonzero(self._resident[:top])) - num_live
        if not self._resident[pages].all() or (num_live, num_free) != (self._num_live, self._num_free):
            raise IntegrityError(f"page counts of {self.owner} do not agree with its pages")

    def close(self) -> None:
        """Give the whole range back; nothing can be committed afterwards. A second close does nothing."""
        if self.virtual_bytes == 0:
            return
        ledger, tier = self._arena.ledger, self._arena.tier.name
        ledger.release(self.owner, tier, self.live_bytes)
        ledger.release(FREE_OWNER, tier, self.free_bytes)
        self._covers = np.zeros(0, dtype=np.int32)
        self._resident = np.zeros(0, dtype=bool)
        self._freed_at = np.zeros(0, dtype=np.float64)
        self._freed = []
        self._top = self._num_live = self._num_free = self._num_noted = self.virtual_bytes = 0
        self._mapping.close()
        self._arena.forget(self)

    def _note_freed(self, pages: Offsets) -> None:
        """Remember when pages became free, so that ``trim`` need not look at all pages of the range."""
        if pages.size == 0 or not self._arena.tier.elastic:
            return
        now = self._arena.clock()
        self._freed_at[pages] = now
        self._freed.append((now, pages))
        self._num_noted += int(pages.size)
        if self._num_noted > 2 * (self._num_free + pages.size) + _FEW_PAGES:  # mostly in use again
            noted = np.unique(np.concatenate([each for _, each in self._freed]))
            noted = noted[(self._covers[noted] == 0) & self._resident[noted]]
            order = np.argsort(self._freed_at[noted], kind="stable")
            times, first = np.unique(self._freed_at[noted[order]], return_index=True)
            self._freed = list(zip(times.tolist(), np.split(noted[order], first[1:]), strict=True))
            self._num_noted = int(noted.size)

    def _pages(self, starts: Offsets, extent_bytes: int) -> Offsets:
        """Return the page of every (extent, page) pair, repeated where extents share one."""
        if extent_bytes < 1 or (starts.size and (starts.min() < 0 or starts.max() + extent_bytes > self.virtual_bytes)):
            raise IntegrityError(f"extent of {extent_bytes} bytes is empty or outside the range of {self.owner}")
        first = starts // self._page
        count = (starts + extent_bytes - 1) // self._page - first + 1
        total = int(count.sum())
        begins = np.cumsum(count) - count
        return np.repeat(first - begins, count) + np.arange(total, dtype=np.int64)


class Arena:
    """Hands out ranges of one tier and charges their resident pages to the ledger.

    Args:
        tier: where the bytes are.
        ledger: who pays.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, tier: MemoryTier, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self.tier, self.ledger, self.clock = tier, ledger, clock
        self._ranges: list[Range] = []

    def num_pages(self, num_bytes: int) -> int:
        """Return the pages that ``num_bytes`` take, at least one."""
        return max(-(-num_bytes // self.tier.page_bytes), 1)

    def reserve(self, virtual_bytes: int, owner: str) -> Range:
        """Return address space for ``owner``; on an elastic tier nothing is charged until ``Range.commit``.

        Raises:
            OutOfBudget: the tier is static and the whole range does not fit.
        """
        static_bytes = 0 if self.tier.elastic else self.num_pages(virtual_bytes) * self.tier.page_bytes
        self.charge(FREE_OWNER, static_bytes)
        try:
            made = Range(self, owner, virtual_bytes)
        except BaseException:
            self.ledger.release(FREE_OWNER, self.tier.name, static_bytes)
            raise
        self._ranges.append(made)
        return made

    def charge(self, owner: str, num_bytes: int, keep: tuple[Range, Offsets] | None = None) -> None:
        """Charge bytes, first giving free pages back if the budget is tight (``keep``: free pages about to be used).

        Raises:
            OutOfBudget: they do not fit; no page was given back then.
        """
        if self.ledger.try_charge(owner, self.tier.name, num_bytes):
            return
        kept_bytes = 0 if keep is None else keep[1].size * self.tier.page_bytes
        spare = self.free_bytes() - kept_bytes if self.tier.elastic else 0
        if num_bytes > (self.ledger.available(self.tier.name) or 0) + spare:
            raise self.ledger.refusal(owner, self.tier.name, num_bytes)
        for each in self._ranges:
            each.trim(np.inf, keep[1] if keep is not None and keep[0] is each else None)
        self.ledger.charge(owner, self.tier.name, num_bytes)

    def transfer(self, source: str, target: str, num_bytes: int) -> None:
        """Move a charge between owners of this tier."""
        self.ledger.transfer(source, target, self.tier.name, num_bytes)

    def trim(self, idle_s: float = IDLE_S) -> int:
        """Give back pages that have been free for ``idle_s`` seconds; return their bytes."""
        before = self.clock() - idle_s
        return sum(each.trim(before) for each in self._ranges)

    def free_bytes(self) -> int:
        """Return bytes that are resident but unused (of all ranges; charged to ``arena.free``)."""
        return sum(each.free_bytes for each in self._ranges)

    def forget(self, closed: Range) -> None:
        """Called by a range that closes."""
        self._ranges.remove(closed)
