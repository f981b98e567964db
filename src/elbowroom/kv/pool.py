"""StripPool: allocation, sharing and freeing of the layer strips of one format.

The strips of one token block over all layers of the pool form a *group*, side by side, so that moving a block is one
long run; ``Extents`` hands out groups so that those of a sequence lie in few runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import PageFormat
from elbowroom.errors import ElbowroomError, IntegrityError
from elbowroom.kv.extents import Ask, Extents
from elbowroom.memory.arena import Arena

ABSENT = np.uint32(0xFFFFFFFF)
"""Table entry of a strip that has expired."""
UNIT_BYTES = 64

Groups = npt.NDArray[np.int64]
Entries = npt.NDArray[np.uint32]


class StripPool:
    """Strips of one format, in groups of those that are taken and freed together.

    Args:
        arena: where pages come from.
        owner: ledger account.
        fmt: layout of a strip.
        num_layers: strips of a group.
        virtual_bytes: address space; pages are taken only for strips in use.
    """

    def __init__(
        self,
        arena: Arena,
        owner: str,
        fmt: PageFormat,
        num_layers: int,
        virtual_bytes: int,
    ) -> None:
        self.fmt = fmt
        self.num_layers = num_layers
        self.strip_bytes = fmt.strip_bytes
        self.group_bytes = fmt.strip_bytes * num_layers
        self.num_groups = max(1, min(virtual_bytes, int(ABSENT) * UNIT_BYTES) // self.group_bytes)
        self._range = arena.reserve(self.num_groups * self.group_bytes, owner)
        self._refs = np.zeros((self.num_groups, num_layers), dtype=np.int32)
        self.extents = Extents(self.num_groups)
        """Its free groups."""

    @property
    def base(self) -> Tensor:
        """uint8 tensor that all strip offsets refer to."""
        return self._range.base

    @property
    def live_bytes(self) -> int:
        """Bytes of pages that hold strips."""
        return self._range.live_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of resident pages that hold no strip."""
        return self._range.free_bytes

    @property
    def num_strips(self) -> int:
        """Strips in use, shared ones once."""
        return int(np.count_nonzero(self._refs[: self.extents.fresh]))

    @property
    def num_shared_strips(self) -> int:
        """Strips that more than one sequence holds."""
        return int(np.count_nonzero(self._refs[: self.extents.fresh] > 1))

    @property
    def num_free_groups(self) -> int:
        """Groups that address space is left for."""
        return self.extents.num_free

    def groups_of(self, num_groups: int, num_singles: int = 0) -> int:
        """Return the groups that so many whole ones and so many single strips take."""
        return num_groups - (-num_singles // self.num_layers)

    def group_of(self, entry: int) -> int:
        """Return the group of the strip of a table entry."""
        return entry * UNIT_BYTES // self.group_bytes

    def cost(self, num_groups: int, num_singles: int = 0, asks: Sequence[Ask] = ()) -> int:
        """Return the bytes by which taking ``num_groups``, then ``num_singles`` strips, would raise ``live_bytes``.

        ``asks``: the groups, as ``take`` would be asked for them.
        """
        trial = self.extents.copy()
        wanted = [*(asks or [Ask(num_groups)]), Ask(self.groups_of(0, num_singles))]
        groups = np.asarray([group for ask in wanted for group in trial.take(ask)], dtype=np.int64)
        if groups.size == 0:
            return 0
        strips = self._members(groups).reshape(-1)[: num_groups * self.num_layers + num_singles]
        return self._range.cost(strips * self.strip_bytes, self.strip_bytes)

    def take(self, num_groups: int, asks: Sequence[Ask] = ()) -> Entries:
        """Return table columns ``[num_layers, num_groups]`` of new strips, each held once.

        Args:
            num_groups: columns.
            asks: who wants how many of them, and where; together as many.

        Raises:
            OutOfBudget: the pages do not fit; nothing is taken.
        """
        wanted = asks or [Ask(num_groups)]
        return self._take(wanted, num_groups * self.num_layers).reshape(num_groups, self.num_layers).T

    def take_singles(self, num_strips: int) -> Entries:
        """Return table columns ``[1, num_strips]`` of new strips that have nothing to do with each other.

        Raises:
            OutOfBudget: the pages do not fit; nothing is taken.
        """
        return self._take([Ask(self.groups_of(0, num_strips))], num_strips)[None]

    def _take(self, asks: Sequence[Ask], num_strips: int) -> Entries:
        """Return the places of the first ``num_strips`` of new groups."""
        if num_strips == 0:
            return np.empty(0, dtype=np.uint32)
        taken: list[int] = []
        try:
            for ask in asks:
                taken += self.extents.take(ask)
            strips = self._members(np.asarray(taken, dtype=np.int64)).reshape(-1)[:num_strips]
            self._range.commit(strips * self.strip_bytes, self.strip_bytes)
        except ElbowroomError:
            self.extents.give(sorted(taken))
            raise
        self._refs.reshape(-1)[strips] = 1
        return (strips * (self.strip_bytes // UNIT_BYTES)).astype(np.uint32)

    def share(self, entries: Entries) -> None:
        """Hold the strips of table ``entries`` once more."""
        strips = self._strips(entries)
        np.add.at(self._refs.reshape(-1), strips, 1)

    def release(self, entries: Entries) -> int:
        """Let go of the strips of table ``entries``; return the bytes of pages that hold nothing any more.

        Raises:
            IntegrityError: a strip is not held that often; nothing changes then.
        """
        strips, counts = np.unique(self._strips(entries), return_counts=True)
        if strips.size == 0:
            return 0
        refs = self._refs.reshape(-1)
        if (refs[strips] < counts).any():
            raise IntegrityError("a strip was released more often than it was held")
        refs[strips] -= counts.astype(np.int32)
        dead = strips[refs[strips] == 0]
        if dead.size == 0:
            return 0
        groups = np.unique(dead // self.num_layers)
        empty = groups[~self._refs[groups].any(axis=1)]
        self.extents.give(empty.tolist())
        return self._range.decommit(dead * self.strip_bytes, self.strip_bytes)

    def is_shared(self, entries: Entries) -> bool:
        """Return whether any of the strips is held by somebody else too."""
        return bool((self._refs.reshape(-1)[self._strips(entries)] > 1).any())

    def copy(self, source: Entries, target: Entries) -> None:
        """Copy strips byte by byte (copy-on-write)."""
        for old, new in zip(source.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True):
            self.strip(new).copy_(self.strip(old))

    def strip(self, entry: int) -> Tensor:
        """Return one strip as uint8 ``[strip_bytes]``."""
        start = entry * UNIT_BYTES
        return self.base[start : start + self.strip_bytes]

    def check(self, expected: Entries) -> None:
        """Raise IntegrityError unless ``expected`` (every entry of every table) is what is held."""
        counts = np.bincount(self._strips(expected), minlength=self._refs.size)
        if not np.array_equal(counts, self._refs.reshape(-1)):
            raise IntegrityError("strip reference counts do not agree with the tables")
        empty = np.flatnonzero(~self._refs[: self.extents.fresh].any(axis=1)).tolist()
        free = self.extents.free_groups()
        if empty != free or len(free) != self.extents.num_used_free or self._refs[self.extents.fresh :].any():
            raise IntegrityError("the free strip groups do not agree with the reference counts")
        self._range.check(np.flatnonzero(counts) * self.strip_bytes, self.strip_bytes)

    def close(self) -> None:
        """Give the range back."""
        self._range.close()

    def _members(self, groups: Groups) -> Groups:
        """Return the numbers of strips ``[groups, num_layers]``."""
        members: Groups = groups[:, None] * self.num_layers + np.arange(self.num_layers)[None, :]
        return members

    def _strips(self, entries: Entries) -> Groups:
        held = entries.reshape(-1)
        strips: Groups = held[held != ABSENT].astype(np.int64) // (self.strip_bytes // UNIT_BYTES)
        return strips
