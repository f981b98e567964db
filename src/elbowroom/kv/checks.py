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
from elbowroom.kv.layout import Lane, PoolSet
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


def check_rollback(pools: PoolSet, plan: BoundPlan, sequence: Sequence, num_tokens: int) -> None:
    """Refuse to go back to the first ``num_tokens`` of a sequence if what they need is gone.

    Raises:
        IntegrityError: names what is gone, and what to do instead.
    """
    if not 0 <= num_tokens <= sequence.num_tokens:
        raise IntegrityError(f"a sequence of {sequence.num_tokens} tokens has no prefix of {num_tokens}")
    if num_tokens < sequence.chosen_tokens:
        raise IntegrityError(
            f"cannot go back to token {num_tokens}: plan {plan.plan} chose among all tokens before "
            f"{sequence.chosen_tokens}",
            "prefill the prefix again",
        )
    for lane in pools.main:
        if lane.holding.chosen:
            continue
        lost = int(sequence.expired_blocks[lane.first_row])
        if lost > lane.holding.expired(num_tokens):
            raise IntegrityError(
                f"cannot go back to token {num_tokens}: tokens before {lost * STRIP_TOKENS} left the sliding "
                f"window of {lane.holding.window}",
                "prefill the prefix again",
            )
    if num_tokens % STRIP_TOKENS:
        check_open(pools, plan, sequence, num_tokens // STRIP_TOKENS, f"cannot go back to token {num_tokens}")


def check_open(pools: PoolSet, plan: BoundPlan, sequence: Sequence, block: int, refusal: str) -> None:
    """Refuse what needs the tokens of ``block`` as they were before sealing, if those are gone."""
    for lane in pools.tails:
        if not sequence.holds(lane.first_row, block):
            first, codec = block * STRIP_TOKENS, plan.plan.layout.name
            raise IntegrityError(
                f"{refusal}: tokens {first} to {first + STRIP_TOKENS - 1} are sealed by codec {codec!r}",
                f"go back to token {first} and prefill from there",
            )
