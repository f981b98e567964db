"""Checks of what a store holds, and of what it is given to hold."""

from __future__ import annotations

from collections.abc import Sequence as Pieces

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kernels.extras import check_extras
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.heads import Places, check_heads
from elbowroom.kv.holding import NEVER, Extent
from elbowroom.kv.layout import Lane
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.kv.sequence import Rows, Sequence


def check_import(
    plan: BoundPlan,
    extent: Extent,
    pieces: Pieces[tuple[int, StripPool, int, int]],
    payload: memoryview,
    places: Places,
) -> None:
    """Refuse a span that no store would have exported: it would be read as places and channels.

    Args:
        plan: of the store.
        extent: what the span says it holds.
        pieces: row, pool, first and end block of its strips.
        payload: their bytes, one behind the other.
        places: of the KV heads that it holds.

    Raises:
        IntegrityError: says what is wrong.
    """
    full, chosen = extent.num_tokens // STRIP_TOKENS, plan.chosen_layers
    for layer, block in enumerate(extent.open_from):
        dropped = extent.dropped[layer] if extent.dropped else 0
        waits = plan.defers and layer in chosen and dropped <= block <= full
        if not waits and block != NEVER:
            raise IntegrityError(f"the KV span names block {block} of layer {layer} as open")
    offset = 0
    for row, pool, first, end in pieces:
        for _ in range(first, end):
            chunk = np.frombuffer(payload, dtype=np.uint8, count=pool.strip_bytes, offset=offset)
            check_extras(chunk, pool.fmt)
            check_heads(chunk, pool.fmt, places, row)
            offset += pool.strip_bytes


def check_part(sequence: Sequence, lane: Lane, rows: Rows, _: int, end: int) -> None:
    """Rows of a lane hold what they should between steps; blocks of a step that never ran may lie behind that."""
    if lane.holding.part == "fresh":
        return
    held, gone = sequence.table[rows] != ABSENT, int(sequence.expired_blocks[rows[0]])
    if held.shape[1] < end or not held[:, gone:end].all() or held[:, :gone].any():
        raise IntegrityError("a table lacks strips that did not expire, or holds some that did")
    if lane.holding.part == "sealed" and lane.pool.fmt.kept_heads:
        for row, entries in zip(rows.tolist(), sequence.table[rows], strict=True):
            for entry in entries[entries != ABSENT].tolist():
                check_heads(lane.pool.strip(entry).numpy(), lane.pool.fmt, sequence.places, row)
