"""Moving: where the bytes of a sequence lie, so that they can be written and read without a copy.

A *held block* is what one lane of a store holds of 64 tokens: the strips of all its layers. They lie side by side, and
so do those of neighbouring blocks, as far as the pool could give them in runs.
"""

from __future__ import annotations

from collections.abc import Sequence as Blocks
from typing import NamedTuple

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import PlanError
from elbowroom.kv.holding import Extent
from elbowroom.kv.layout import PoolSet
from elbowroom.kv.plan import KVPlan
from elbowroom.kv.pool import UNIT_BYTES
from elbowroom.kv.sequence import Sequence


class HeldBlock(NamedTuple):
    """Bytes of a token block in a lane, where they lie."""

    lane: int
    block: int
    starts: tuple[int, ...]
    """First byte of each run in its pool."""
    views: tuple[memoryview, ...]
    """The runs, uint8."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all runs."""
        return sum(view.nbytes for view in self.views)

    def is_full(self, num_tokens: int) -> bool:
        """Return whether all its tokens are among the first ``num_tokens``: its bytes are final then."""
        return (self.block + 1) * STRIP_TOKENS <= num_tokens


def can_move(plan: KVPlan) -> bool:
    """Return whether sequences of ``plan`` can be lent: it chooses neither tokens, heads nor channels."""
    return plan.policy is None and plan.heads is None and plan.channels is None


def check_moving(plan: KVPlan) -> None:
    """Refuse to lend sequences of a plan.

    Raises:
        PlanError: the plan chooses among tokens, heads or channels.
    """
    if not can_move(plan):
        raise PlanError(
            f"sequences of plan {plan.text!r} cannot be swapped: what it chose is no function of positions",
            "let them be computed again (--preempt recompute), or use a plan of a codec (and quest) alone",
        )


def held_blocks(pools: PoolSet, sequence: Sequence, num_tokens: int) -> list[HeldBlock]:
    """Return what a sequence holds of its first ``num_tokens`` between steps, lane by lane."""
    found = []
    for number, (lane, rows, first, end) in enumerate(pools.parts(Extent(num_tokens))):
        whole = memoryview(lane.pool.base.numpy())  # type: ignore[arg-type]  # numpy has the buffer protocol
        starts = sequence.table[rows, first:end].T.astype(np.int64) * UNIT_BYTES
        for block, strips in enumerate(starts, first):
            begins, size = _runs(strips.tolist(), lane.pool.strip_bytes)
            views = tuple([whole[begin : begin + bytes_] for begin, bytes_ in zip(begins, size, strict=True)])
            found.append(HeldBlock(number, block, begins, views))
    return found


def count_copies(blocks: Blocks[HeldBlock]) -> int:
    """Return the runs of bytes, side by side in memory, that ``blocks`` make up in their order."""
    count, lane, end = 0, -1, -1
    for each in blocks:
        for start, view in zip(each.starts, each.views, strict=True):
            count += (each.lane, start) != (lane, end)
            lane, end = each.lane, start + view.nbytes
    return count


def _runs(strips: list[int], strip_bytes: int) -> tuple[tuple[int, ...], list[int]]:
    """Return first bytes and sizes of what ``strips`` (first byte of each) make up side by side."""
    begins, sizes = [strips[0]], [strip_bytes]
    for start in strips[1:]:
        if start == begins[-1] + sizes[-1]:
            sizes[-1] += strip_bytes
        else:
            begins.append(start)
            sizes.append(strip_bytes)
    return tuple(begins), sizes
