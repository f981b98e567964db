"""Slots: single tokens of open strips are moved to other slots, or blanked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels.digest import write_digest
from elbowroom.kv.base import Positions
from elbowroom.kv.codecs import Codec, TokenCodec
from elbowroom.kv.layout import PoolSet
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.kv.sequence import Sequence


class Slots:
    """Writes to strips that take tokens one by one, without attention.

    Args:
        pools: where the strips lie.
        layout: how sealed strips are encoded.
        open_codec: how tokens lie in open ones.
    """

    def __init__(self, pools: PoolSet, layout: Codec, open_codec: TokenCodec) -> None:
        self._pools, self._layout, self._open_codec = pools, layout, open_codec

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
                for entry in sequence.table[lane.rows, block].tolist():
                    if entry != ABSENT:
                        self._digest(lane.pool.strip(entry), lane.pool, used)

    def seal(self, sequence: Sequence, first: int, end: int) -> None:
        """Seal the blocks ``first .. end - 1`` again, from their tails."""
        slots = torch.arange(STRIP_TOKENS)
        for lane, tail in zip(self._pools.main, self._pools.tails, strict=False):
            for row, open_row in zip(lane.rows.tolist(), tail.rows.tolist(), strict=True):
                for block in range(first, end):
                    source, target = int(sequence.table[open_row, block]), int(sequence.table[row, block])
                    k, v = self._open_codec.open(tail.pool.strip(source), tail.pool.fmt)
                    self._layout.store(lane.pool.strip(target), lane.pool.fmt, slots, k, v)

    def blanked(self, strip: Tensor, pool: StripPool, used: int) -> Tensor:
        """Return a copy without the slots from ``used`` on: they may hold what another sequence left there."""
        copy = strip.clone()
        for part in self._open_codec.fields(copy, pool.fmt):
            part[:, used:] = 0
        self._digest(copy, pool, used)
        return copy

    def _digest(self, strip: Tensor, pool: StripPool, used: int) -> None:
        """Make the bounds on the keys of a strip anew, from its first ``used`` tokens, if it has any."""
        if pool.fmt.digest_bytes:
            write_digest(strip, pool.fmt, self._open_codec.open(strip, pool.fmt)[0], 0, used, used)
