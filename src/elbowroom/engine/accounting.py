"""KVPricing: what sequences cost in bytes, as the scheduler counts; integers only.

The numbers come from the plan's curve, rounded up to whole pages, so that a schedule that fits here fits the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.kv.plan import BoundPlan


def num_blocks(num_tokens: int) -> int:
    """Return the blocks that hold ``num_tokens``."""
    return -(-num_tokens // STRIP_TOKENS)


@dataclass(frozen=True, slots=True)
class KVPricing:
    """Prices of a sequence by its number of blocks."""

    by_blocks: tuple[int, ...]
    """``by_blocks[b]``: bytes of a sequence of b blocks, all private."""
    block_bytes: int
    """Bytes of one block over all layers; what a shared prefix block saves."""
    transient_bytes: int
    """On top while a step appends a chunk."""
    can_share: bool
    """Whether prefixes are shared between sequences (not with sliding windows: a shared block could not expire)."""

    @classmethod
    def of(cls, plan: BoundPlan, max_tokens: int, step_tokens: int, page_bytes: int) -> KVPricing:
        """Return the prices of ``plan`` for sequences of up to ``max_tokens``."""
        blocks = np.arange(num_blocks(max_tokens) + 1, dtype=np.int64)
        curve = plan.curve(0, blocks * STRIP_TOKENS, step_tokens)
        # Strips that are no whole number of pages share pages; a block's ends may then need one page more.
        slack = 0 if plan.block_bytes % page_bytes == 0 else page_bytes
        prices = curve.resident_bytes + blocks * slack
        return cls(
            by_blocks=tuple(prices.tolist()),
            block_bytes=plan.block_bytes + slack,
            transient_bytes=curve.transient_bytes,
            can_share=not plan.has_windows,
        )

    def price(self, blocks: int, shared_blocks: int = 0) -> int:
        """Return the private bytes of a sequence of ``blocks``, the first ``shared_blocks`` of them paid elsewhere."""
        return self.by_blocks[blocks] - shared_blocks * self.block_bytes

    def largest(self, capacity_bytes: int) -> int:
        """Return the most tokens that one sequence alone can have in ``capacity_bytes``."""
        room = capacity_bytes - self.transient_bytes
        fitting = int(np.searchsorted(np.asarray(self.by_blocks), room, side="right")) - 1
        return max(fitting, 0) * STRIP_TOKENS
