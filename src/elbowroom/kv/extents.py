"""Extents: free groups of a pool as runs, so that what belongs together comes to lie side by side.

The block-group manager of FastSwitch (Shen et al., 2024, section on dynamic block groups). Who asks for groups says
which group it has last, and how many it expects: it goes on right behind that one where this is free; else it gets a
new run, and the rest of what it expects stays *claimed* behind it. Claims cost nothing: a claimed group is free,
counted as such, and given to others when nothing else is left, from the far end of the longest claim.

Groups that were used before come first, since their pages may still be resident; those that never were are one extent
at the end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from elbowroom.errors import IntegrityError


class Ask(NamedTuple):
    """Groups that are wanted together."""

    num_groups: int
    after: int = -1
    """The last group of whoever asks; -1: none."""
    expected: int = 0
    """How many it will want in all, these included, if anybody knows."""


class Extents:
    """Free groups among ``num_groups``: all of them at first.

    Args:
        num_groups: groups of the pool.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.fresh = 0
        """Groups from here on were never taken."""
        self.num_used_free = 0
        """Free groups before that, claimed ones included."""
        self._length: dict[int, int] = {}
        """First group of each free run that nobody claims -> its groups."""
        self._start: dict[int, int] = {}
        """End of each of those -> its first group."""
        self._by_length: list[tuple[int, int]] = []
        """(groups, first group) of each, ascending."""
        self._claims: dict[int, int] = {}
        """First group of each claimed run -> its groups; the one before it is the last of whoever claims it."""

    @property
    def num_free(self) -> int:
        """Free groups."""
        return self.num_groups - self.fresh + self.num_used_free

    def copy(self) -> Extents:
        """Return the same free groups, to try something out."""
        twin = Extents(self.num_groups)
        twin.fresh, twin.num_used_free = self.fresh, self.num_used_free
        twin._length, twin._start = self._length.copy(), self._start.copy()
        twin._by_length, twin._claims = self._by_length.copy(), self._claims.copy()
        return twin

    def free_groups(self) -> list[int]:
        """Return the free groups that were used before, ascending."""
        runs = [*self._length.items(), *self._claims.items()]
        return sorted(group for start, length in runs for group in range(start, start + length))

    def take(self, ask: Ask) -> list[int]:
        """Return ``ask.num_groups`` groups, which are not free any more.

        Raises:
            IntegrityError: there are not so many; nothing changes then.
        """
        if ask.num_groups > self.num_free:
            raise IntegrityError(f"address space for {ask.num_groups} strip groups is used up")
        expected = max(ask.expected, ask.num_groups)
        groups = self._behind(ask.after, ask.num_groups, expected) if ask.after >= 0 else []
        while len(groups) < ask.num_groups:
            self._take_run(groups, ask.num_groups - len(groups), expected - len(groups))
        return groups

    def give(self, groups: list[int]) -> None:
        """Make groups free, ascending ones that were taken."""
        begin = 0
        for index in range(1, len(groups) + 1):
            if index == len(groups) or groups[index] != groups[index - 1] + 1:
                self._add(groups[begin], index - begin)
                begin = index
        self.num_used_free += len(groups)

    def _behind(self, after: int, count: int, expected: int) -> list[int]:
        """Return up to ``count`` groups right behind group ``after``."""
        start = after + 1
        if start in self._claims:
            length = self._claims.pop(start)
            taken = min(count, length)
            if length > taken:
                self._claims[start + taken] = length - taken
        elif start in self._length:
            taken = min(count, self._length[start])
            self._cut(start, taken, expected - taken)
        elif start == self.fresh < self.num_groups:
            taken = min(count, self.num_groups - start)
            self._begin_fresh(taken, expected - taken)
        else:
            return []
        self.num_used_free -= taken
        groups = list(range(start, start + taken))
        # What lies behind a claim that is used up may be free as well.
        more = start + taken in self._length or start + taken == self.fresh < self.num_groups
        return groups + self._behind(groups[-1], count - taken, expected - taken) if taken < count and more else groups

    def _take_run(self, groups: list[int], count: int, expected: int) -> None:
        """Append up to ``count`` groups that lie side by side."""
        longest = self._by_length[-1][0] if self._by_length else 0
        num_fresh = self.num_groups - self.fresh
        if longest >= expected or (longest and longest >= num_fresh):
            place = min(bisect_left(self._by_length, (expected, -1)), len(self._by_length) - 1)
            length, start = self._by_length[place]
            taken = min(count, length)
            self._cut(start, taken, expected - taken)
        elif num_fresh:
            start, taken = self.fresh, min(count, num_fresh)
            self._begin_fresh(taken, expected - taken)
        else:
            start, taken = self._split(count)
        self.num_used_free -= taken
        groups.extend(range(start, start + taken))

    def _split(self, count: int) -> tuple[int, int]:
        """Return start and length of what is taken from the far end of the longest claim."""
        start = max(self._claims, key=lambda each: (self._claims[each], each))
        length = self._claims.pop(start)
        taken = min(count, length)
        if length > taken:
            self._claims[start] = length - taken
        return start + length - taken, taken

    def _begin_fresh(self, taken: int, claimed: int) -> None:
        """Use ``taken`` groups for the first time and claim as many as there are of ``claimed`` behind them."""
        start, self.fresh = self.fresh, self.fresh + taken
        self.num_used_free += taken
        claimed = min(claimed, self.num_groups - self.fresh)
        if claimed > 0:
            self._claims[start + taken] = claimed
            self.fresh += claimed
            self.num_used_free += claimed

    def _cut(self, start: int, taken: int, claimed: int) -> None:
        """Take groups from the beginning of a free run and claim some behind them; the rest stays free."""
        length = self._length[start]
        self._remove(start)
        claimed = max(min(claimed, length - taken), 0)
        if claimed:
            self._claims[start + taken] = claimed
        if length > taken + claimed:
            self._insert(start + taken + claimed, length - taken - claimed)

    def _add(self, start: int, length: int) -> None:
        """Add a free run, joined with its neighbours; a claim behind it has lost its owner."""
        if start in self._start:
            before = self._start[start]
            length += start - before
            self._remove(before)
            start = before
        length += self._claims.pop(start + length, 0)
        if start + length in self._length:
            behind = start + length
            length += self._length[behind]
            self._remove(behind)
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length[start], self._start[start + length] = length, start
        insort(self._by_length, (length, start))

    def _remove(self, start: int) -> None:
        length = self._length.pop(start)
        del self._start[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
