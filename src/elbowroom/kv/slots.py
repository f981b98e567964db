"""Slots: single tokens of open strips are moved to other slots, or blanked."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels.digest import write_digest
from elbowroom.kv.base import Positions
from elbowroom.kv.codecs import Codec, token_codec
from elbowroom.kv.layout import PoolSet
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.kv.sequence import Sequence


class Slots:
    """Writes to strips that take tokens one by one, without attention.

    Args:
        pools: where the strips lie.
        layouts: how the strips of each layer are encoded.
    """

    def __init__(self, pools: PoolSet, layouts: Rows[Codec]) -> None:
        self._pools, self._layouts = pools, layouts
        self._open_codec = token_codec(layouts[0])  # all layers have one, but for the order of channels

    def move(self, sequence: Sequence, sources: Positions, targets: Positions) -> None:
        """Copy tokens to lower slots, one run of equal (source block, target block) at a time."""
        pairs = sources // STRIP_TOKENS * sequence.num_blocks + targets // STRIP_TOKENS
        for run in np.split(np.arange(pairs.size), np.flatnonzero(np.diff(pairs)) + 1):
            blocks = int(sources[run[0]]) // STRIP_TOKENS, int(targets[run[0]]) // STRIP_TOKENS
            read_slots, write_slots = sources[run] % STRIP_TOKENS, targets[run] % STRIP_TOKENS
            for lane in self._pools.open:
                for row in lane.rows.tolist():
                    source, target = (int(sequence.table[row, block]) for block in blocks)
                    if target == ABSENT:  # the window has passed: nobody will read it
                        continue
                    read, write = (
                        self._open_codec.fields(lane.pool.strip(entry), lane.pool.fmt) for entry in (source, target)
                    )
                    for old, new in zip(read, write, strict=True):
                        new[:, write_slots] = old[:, read_slots]
        for block in np.unique(targets // STRIP_TOKENS).tolist():
            used = min(int(targets[-1]) + 1 - block * STRIP_TOKENS, STRIP_TOKENS)
            for lane in self._pools.open:
                for row in lane.rows.tolist():
                    entry = int(sequence.table[row, block])
                    if entry != ABSENT:
                        self._digest(lane.pool.strip(entry), lane.pool, row, used)

    def seal(self, sequence: Sequence, first: int, end: int) -> None:
        """Seal the blocks ``first .. end - 1`` again, from their tails."""
        slots = torch.arange(STRIP_TOKENS)
        for lane, tail in zip(self._pools.main, self._pools.tails, strict=False):
            for row, open_row in zip(lane.rows.tolist(), tail.rows.tolist(), strict=True):
                for block in range(first, end):
                    source, target = int(sequence.table[open_row, block]), int(sequence.table[row, block])
                    k, v = self._open_codec.open(tail.pool.strip(source), tail.pool.fmt)
                    self._layouts[row].store(lane.pool.strip(target), lane.pool.fmt, slots, k, v)

    def blanked(self, strip: Tensor, pool: StripPool, row: int, used: int) -> Tensor:
        """Return a copy of a strip of a row without the slots from ``used`` on: they may hold what others left."""
        copy = strip.clone()
        for part in self._open_codec.fields(copy, pool.fmt):
            part[:, used:] = 0
        self._digest(copy, pool, row, used)
        return copy

    def _digest(self, strip: Tensor, pool: StripPool, row: int, used: int) -> None:
        """Make the bounds on the keys of a strip anew, from its first ``used`` tokens, if it has any."""
        if pool.fmt.digest_bytes:
            write_digest(strip, pool.fmt, self._layouts[row].open(strip, pool.fmt)[0], 0, used, used)
