"""Padded strip tables of a step, kept from step to step while the batch stays the same."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.kv.base import KVStep
from elbowroom.kv.heads import Places
from elbowroom.kv.holding import NEVER
from elbowroom.kv.pool import ABSENT
from elbowroom.kv.sequence import Sequence, Table

_SPARE_BLOCKS = 4
"""Room for growth, so that a decoding batch is not copied anew at every block boundary."""


class TableCache:
    """Tables ``[num_layers, R, blocks]`` of the last batch; only rows that changed are written again.

    Args:
        num_layers: layers of the model, which are the first rows of a sequence's table.
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
                self._tables[:, row, : sequence.num_blocks] = sequence.table[: self._num_layers]
                self._tables[:, row, sequence.num_blocks :] = ABSENT
        self._versions = versions
        return self._tables

    def clear(self) -> None:
        """Forget the batch (and with it, sequences that were closed)."""
        self._rows, self._versions = (), []
        self._tables = np.empty((self._num_layers, 0, 0), dtype=np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """Strips of a step's own blocks, and those of them that it fills."""

    tables: Table
    """``[num_layers, R, blocks]``: column b is block ``first_blocks[r] + b``."""
    first_blocks: npt.NDArray[np.int64]
    """``[R]``."""
    full: Rows[Table]
    """For each layer, places ``[S]`` of the blocks that the step fills and seals."""
    sealed: Rows[Table]
    """For each layer, where they are sealed."""
    open_from: npt.NDArray[np.int64] | None
    """``[num_layers, R]``: blocks from here on wait for the end of a prompt; None: none does."""

    places: Places
    """For each layer int8 ``[R, Hkv]``: where KV heads lie in sealed strips, see ``Tail``; empty: all stay."""

    def open_in(self, layer: int) -> npt.NDArray[np.int64] | None:
        """Return the first open block of each row in ``layer``."""
        return None if self.open_from is None else self.open_from[layer]


class TailCache:
    """Tails of the last batch; a decoding batch needs new ones only at a block's boundary.

    Args:
        num_layers: layers of the model. Of a sequence's table, these rows are followed by those of their tails.
        staging: for each layer with keys of its own, the row of the blocks that pass through.
        whole: places of the KV heads of a sequence that has all of them; empty: all sequences have.
    """

    def __init__(self, num_layers: int, staging: dict[int, int], whole: Places) -> None:
        self._num_layers, self._whole = num_layers, whole
        self._owners = sorted(staging)
        # Layers that read those of others have rows without strips.
        self._staging = np.asarray([staging.get(layer, num_layers + layer) for layer in range(num_layers)])
        self._last: tuple[tuple[Sequence, ...], list[int], list[int], Tails] | None = None

    def update(
        self,
        rows: Rows[Sequence],
        step: KVStep,
        lengths: npt.NDArray[np.int64],
        waiting: dict[int, npt.NDArray[np.int64]],
    ) -> Tails:
        """Return the tails of ``rows``.

        Args:
            rows: sequences of the step.
            step: their positions.
            lengths: tokens of each sequence behind the step.
            waiting: for each row whose prompt waits for its end, the first open block ``[num_layers]``.
        """
        first = step.positions[step.row_starts[:-1]] // STRIP_TOKENS
        last = step.positions[step.row_starts[1:] - 1] // STRIP_TOKENS
        batch, versions, blocks = tuple(rows), [sequence.version for sequence in rows], first.tolist()
        filled = bool((lengths // STRIP_TOKENS > first).any())
        known = self._last
        if waiting:
            self._last = None
            return self._make(rows, first, last, lengths, waiting)
        if known is not None and not filled and (batch, versions, blocks) == known[:3] and bool((first == last).all()):
            return known[3]
        tails = self._make(rows, first, last, lengths, waiting)
        # What the step fills is filled once.
        self._last = None if filled else (batch, versions, blocks, tails)
        return tails

    def clear(self) -> None:
        """Forget the batch."""
        self._last = None

    def _make(
        self,
        rows: Rows[Sequence],
        first: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        waiting: dict[int, npt.NDArray[np.int64]],
    ) -> Tails:
        count = self._num_layers
        open_from = np.full((count, len(rows)), NEVER, dtype=np.int64)
        for row, blocks in waiting.items():
            open_from[:, row] = blocks
        first = np.minimum(first, open_from.min(axis=0))
        tables = np.full((count, len(rows), int((last - first).max(initial=0)) + 1), ABSENT, dtype=np.uint32)
        full: list[list[Table]] = [[] for _ in range(count)]
        sealed: list[list[Table]] = [[] for _ in range(count)]
        for row, (sequence, begin, end) in enumerate(zip(rows, first.tolist(), (last + 1).tolist(), strict=True)):
            tail, passing = sequence.table[count : 2 * count, begin:end], sequence.table[self._staging, begin:end]
            tables[:, row, : end - begin] = np.where(tail == ABSENT, passing, tail)
            # Blocks between positions that are written again may be sealed already.
            held = tables[:, row, : int(lengths[row]) // STRIP_TOKENS - begin] != ABSENT
            owners = [layer for layer in self._owners if row not in waiting or open_from[layer, row] == NEVER]
            filled = np.flatnonzero(held[owners[0]]) if owners else np.empty(0, dtype=np.int64)
            for layer in owners if filled.size else []:
                full[layer].append(tables[layer, row, filled])
                sealed[layer].append(sequence.table[layer, begin + filled])
        open_rows = np.ascontiguousarray(open_from) if waiting else None
        return Tails(tables, first, _joined(full), _joined(sealed), open_rows, self._places(rows))

    def _places(self, rows: Rows[Sequence]) -> Places:
        """Return the places of KV heads; of rows that have not chosen yet all heads are read, and nothing is sealed."""
        if not self._whole:
            return ()
        return tuple(
            np.stack(each) for each in zip(*[sequence.places or self._whole for sequence in rows], strict=True)
        )


def _joined(parts: Rows[Rows[Table]]) -> list[Table]:
    """Return the places of each layer in one array."""
    none = np.empty(0, dtype=np.uint32)
    return [np.concatenate([none, *each]) for each in parts]
