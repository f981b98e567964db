"""StripPool: allocation, sharing and freeing of the layer strips of one format.

The strips of one token block over all layers of the pool form a *group*, side by side, so that moving a block is one
long run. Groups are handed out from a stack: recently freed ones first, because their pages are still resident.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.errors import IntegrityError
from elbowroom.memory.arena import Arena

ABSENT = np.uint32(0xFFFFFFFF)
"""Table entry of a strip that has expired."""
UNIT_BYTES = 64

Groups = npt.NDArray[np.int64]
Entries = npt.NDArray[np.uint32]


class StripPool:
    """Strips of the layers ``layers``, which share one format and one window.

    Args:
        arena: where pages come from.
        owner: ledger account.
        fmt: layout of a strip.
        layers: layer indices that the pool serves, in group order.
        virtual_bytes: address space; pages are taken only for strips in use.
        window: sliding window of those layers in tokens; None means that nothing expires.
    """

    def __init__(
        self,
        arena: Arena,
        owner: str,
        fmt: PageFormat,
        layers: Sequence[int],
        virtual_bytes: int,
        window: int | None = None,
    ) -> None:
        self.fmt = fmt
        self.window = window
        self.layers = np.asarray(layers, dtype=np.int64)
        self.first_layer = int(layers[0])
        self.strip_bytes = fmt.strip_bytes
        self.group_bytes = fmt.strip_bytes * len(layers)
        self.num_groups = max(1, min(virtual_bytes, int(ABSENT) * UNIT_BYTES) // self.group_bytes)
        self._range = arena.reserve(self.num_groups * self.group_bytes, owner)
        self._refs = np.zeros((self.num_groups, len(layers)), dtype=np.int32)
        self._freed: list[int] = []
        """Groups that were used and are empty again, the latest last."""
        self._fresh = 0
        """Groups from here on were never used."""

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
        return int(np.count_nonzero(self._refs[: self._fresh]))

    @property
    def num_shared_strips(self) -> int:
        """Strips that more than one sequence holds."""
        return int(np.count_nonzero(self._refs[: self._fresh] > 1))

    @property
    def num_free_groups(self) -> int:
        """Groups that address space is left for."""
        return self.num_groups - self._fresh + len(self._freed)

    def expired_blocks(self, num_tokens: int) -> int:
        """Return the leading blocks that no query from position ``num_tokens`` on reads."""
        return 0 if self.window is None else max(num_tokens - self.window + 1, 0) // STRIP_TOKENS

    def cost(self, num_groups: int) -> int:
        """Return the bytes by which taking ``num_groups`` would raise ``live_bytes``."""
        if num_groups == 0:
            return 0
        return self._range.cost(self._strip_starts(self._peek(num_groups)), self.strip_bytes)

    def take(self, num_groups: int) -> Entries:
        """Return table columns ``[num_layers, num_groups]`` of new strips, each held once.

        Raises:
            OutOfBudget: the pages do not fit; nothing is taken.
        """
        if num_groups == 0:
            return np.empty((len(self.layers), 0), dtype=np.uint32)
        groups = self._peek(num_groups)
        self._range.commit(self._strip_starts(groups), self.strip_bytes)
        reused = min(num_groups, len(self._freed))
        del self._freed[len(self._freed) - reused :]
        self._fresh += num_groups - reused
        self._refs[groups] = 1
        strips = groups[None, :] * len(self.layers) + np.arange(len(self.layers))[:, None]
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
        groups = np.unique(dead // len(self.layers))
        empty = groups[~self._refs[groups].any(axis=1)]
        self._freed.extend(empty[::-1].tolist())
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
        empty = np.flatnonzero(~self._refs[: self._fresh].any(axis=1)).tolist()
        if empty != sorted(self._freed) or self._refs[self._fresh :].any():
            raise IntegrityError("the stack of free strip groups does not agree with the reference counts")
        self._range.check(np.flatnonzero(counts) * self.strip_bytes, self.strip_bytes)

    def close(self) -> None:
        """Give the range back."""
        self._range.close()

    def _peek(self, num_groups: int) -> Groups:
        if num_groups > self.num_free_groups:
            raise IntegrityError(f"address space for {num_groups} strip groups is used up")
        reused = min(num_groups, len(self._freed))
        fresh = range(self._fresh, self._fresh + num_groups - reused)
        return np.asarray([*self._freed[len(self._freed) - reused :][::-1], *fresh], dtype=np.int64)

    def _strip_starts(self, groups: Groups) -> Groups:
        first = groups[:, None] * self.group_bytes
        starts: Groups = (first + np.arange(len(self.layers))[None, :] * self.strip_bytes).reshape(-1)
        return starts

    def _strips(self, entries: Entries) -> Groups:
        held = entries.reshape(-1)
        strips: Groups = held[held != ABSENT].astype(np.int64) // (self.strip_bytes // UNIT_BYTES)
        return strips
