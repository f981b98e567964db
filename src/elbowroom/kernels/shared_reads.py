"""Which strips are read for which rows, so that those that several sequences hold are read once for all of them.

Two sequences share a block where their tables name the same strip (after a fork, or by a cached prefix). Prefixes need
not be known to whoever plans a step: equal entries tell them, on every level of a tree of prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels.base import StripStep, StripTable

Ints = npt.NDArray[np.int32]
PIECE = 16
"""Blocks of an item at most: long sequences are read by many processors, and their parts merged."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """Items: rows that read the same strips. Each row's part of an item is merged with its parts of other items."""

    sequences: Ints
    """int32 ``[I]``: whose row of the table names the strips of an item."""
    blocks: Ints
    """int32 ``[I, 2]``: the first of them, and the one behind the last."""
    rows: Ints
    """int32 ``[I, tile]``: the rows of the step that read them; -1 where there are fewer."""
    part_starts: Ints
    """int32 ``[N + 1]``: the parts of row n are numbered from ``part_starts[n]`` to below ``part_starts[n + 1]``."""
    numbers: Ints
    """int32 ``[I, tile]``: the numbers of the parts of ``rows``; -1 where there is no row."""

    @property
    def num_items(self) -> int:
        """Items I."""
        return int(self.sequences.size)

    @property
    def num_parts(self) -> int:
        """Parts of all rows."""
        return int(self.part_starts[-1])


def plan_reads(step: StripStep, table: StripTable, low: Ints, high: Ints, tile: int, *, shares: bool) -> ReadPlan:
    """Return which rows read which blocks together.

    Args:
        step: the rows; sequences with more than ``tile`` of them read by themselves.
        table: where blocks lie.
        low: int32 ``[N]``, first slot that each row reads.
        high: int32 ``[N]``, the last one.
        tile: rows of an item at most.
        shares: whether rows of several sequences may stand in an item.
    """
    made: list[tuple[int, int, int, npt.NDArray[np.int64]]] = []
    rows = [np.arange(start, end) for start, end in itertools.pairwise(step.row_starts.tolist())]
    few = [sequence for sequence, own in enumerate(rows) if 0 < len(own) <= tile]
    for sequence, own in enumerate(rows):
        if len(own) > tile:
            made += [(sequence, *_blocks(low, high, part), part) for part in _tiles(own, tile)]
    if few:
        bounds = np.asarray([_blocks(low, high, rows[sequence]) for sequence in few])
        for leader, first, end, members in _shared(table[few], bounds, shares=shares):
            together = np.concatenate([rows[few[member]] for member in members])
            made += [(few[leader], first, end, part) for part in _tiles(together, tile)]
    return _plan(made, step.num_rows, tile)


def _blocks(low: Ints, high: Ints, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
    return int(low[rows].min()) // STRIP_TOKENS, int(high[rows].max()) // STRIP_TOKENS + 1


def _tiles(rows: npt.NDArray[np.int64], tile: int) -> list[npt.NDArray[np.int64]]:
    return [rows[start : start + tile] for start in range(0, len(rows), tile)]


def _shared(
    table: StripTable, bounds: npt.NDArray[np.int64], *, shares: bool
) -> Iterator[tuple[int, int, int, npt.NDArray[np.int64]]]:
    """Yield (leader, first block, end, members): longest runs of blocks that the same members hold, in pieces.

    Args:
        table: ``[S, blocks]``.
        bounds: ``[S, 2]``, the first block that each reads, and the one behind the last.
        shares: False: each is a group of its own.
    """
    columns, everyone = np.arange(bounds[:, 1].max()), np.arange(len(table))[:, None]
    active = (columns >= bounds[:, :1]) & (columns < bounds[:, 1:])
    leaders = _leaders(np.where(active, table[:, : columns.size].astype(np.int64), -1 - everyone), shares=shares)
    leads = active & (leaders == everyone)
    # A group begins anew where one of its members has come, gone or stopped.
    breaks = columns % PIECE == 0
    begins = np.repeat(breaks[None], len(table), axis=0)
    begins[:, 1:] |= leads[:, 1:] & ~leads[:, :-1]
    who, where = np.nonzero(leaders[:, 1:] != leaders[:, :-1])
    begins[leaders[who, where + 1], where + 1] = True
    begins[leaders[who, where], where + 1] = True
    for leader in range(len(table)):
        starts = np.flatnonzero(begins[leader] & leads[leader])
        ends = np.flatnonzero(begins[leader] | ~leads[leader])
        stops = np.append(ends, columns.size)[np.searchsorted(ends, starts, side="right")]
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield leader, start, stop, np.flatnonzero(active[:, start] & (leaders[:, start] == leader))


def _leaders(ids: npt.NDArray[np.int64], *, shares: bool) -> npt.NDArray[np.int64]:
    """Return for each entry the first row with the same one in its column, ``[S, blocks]``."""
    places = np.arange(len(ids))[:, None]
    if not shares:
        return np.broadcast_to(places, ids.shape)
    order = np.argsort(ids, axis=0, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=0)
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    firsts = np.maximum.accumulate(np.where(is_first, places, 0), axis=0)
    leaders = np.empty_like(order)
    np.put_along_axis(leaders, order, np.take_along_axis(order, firsts, axis=0), axis=0)
    return leaders


def _plan(made: list[tuple[int, int, int, npt.NDArray[np.int64]]], num_rows: int, tile: int) -> ReadPlan:
    rows = np.full((len(made), tile), -1, dtype=np.int32)
    for item, (_, _, _, members) in enumerate(made):
        rows[item, : len(members)] = members
    flat = rows.ravel()
    counts = np.bincount(flat[flat >= 0], minlength=num_rows)
    numbers = np.full(flat.size, -1, dtype=np.int32)
    numbers[np.argsort(flat, kind="stable")[flat.size - counts.sum() :]] = np.arange(counts.sum(), dtype=np.int32)
    return ReadPlan(
        sequences=np.asarray([each[0] for each in made], dtype=np.int32),
        blocks=np.asarray([each[1:3] for each in made], dtype=np.int32).reshape(-1, 2),
        rows=rows,
        part_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        numbers=numbers.reshape(rows.shape),
    )
