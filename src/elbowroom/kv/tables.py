"""TableCache: the padded strip tables of a step, kept from step to step while the batch stays the same."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from elbowroom.kv.pool import ABSENT
from elbowroom.kv.sequence import Sequence, Table

_SPARE_BLOCKS = 4
"""Room for growth, so that a decoding batch is not copied anew at every block boundary."""


class TableCache:
    """Tables ``[num_layers, R, blocks]`` of the last batch; only rows that changed are written again.

    Args:
        num_layers: rows of a sequence's table.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._rows: tuple[Sequence, ...] = ()
        self._versions: list[int] = []
        self._tables: Table = np.empty((num_layers, 0, 0), dtype=np.uint32)

    def update(self, rows: Rows[Sequence]) -> Table:
        """Return the tables of ``rows``, contiguous for each layer; blocks that a row lacks are ABSENT."""
        batch, versions = tuple(rows), [sequence.version for sequence in rows]
        if batch == self._rows and versions == self._versions:
            return self._tables
        width = max((sequence.num_blocks for sequence in rows), default=0)
        if batch != self._rows or width > self._tables.shape[2]:
            self._rows = batch
            self._versions = [-1] * len(rows)
            self._tables = np.full((self._num_layers, len(rows), width + _SPARE_BLOCKS), ABSENT, dtype=np.uint32)
        for row, sequence in enumerate(rows):
            if sequence.version != self._versions[row]:
                self._tables[:, row, : sequence.num_blocks] = sequence.table
                self._tables[:, row, sequence.num_blocks :] = ABSENT
        self._versions = versions
        return self._tables

    def clear(self) -> None:
        """Forget the batch (and with it, sequences that were closed)."""
        self._rows, self._versions = (), []
        self._tables = np.empty((self._num_layers, 0, 0), dtype=np.uint32)
