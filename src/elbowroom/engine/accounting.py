"""KVPricing: what sequences cost in bytes, as the scheduler counts; integers only.

The numbers come from the plan's curve, rounded up to whole pages, so that a schedule that fits here fits the store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elbowroom.core import STRIP_TOKENS, PageFormat
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
    """Whether prefixes are shared between sequences; see ``BoundPlan.shares_prefixes``."""
    prompt_limit: int | None = None
    """Most tokens that stay behind a part of a prompt; None: all."""
    end_limit: int | None = None
    """The same behind its end."""
    rollback_grain: int = 1
    """Tokens of whose multiples sequences can go back to any; 0: only to their beginning."""

    @classmethod
    def of(cls, plan: BoundPlan, max_tokens: int, step_tokens: int, page_bytes: int) -> KVPricing:
        """Return the prices of ``plan`` for sequences of up to ``max_tokens``."""
        policy = plan.plan.policy
        prompt_limit, end_limit = (None if policy is None else policy.limit(ends_prompt=ends) for ends in (False, True))
        most = num_blocks(max_tokens) if prompt_limit is None else max(num_blocks(max_tokens), _twice(prompt_limit))
        blocks = np.arange(most + 1, dtype=np.int64)
        curve = _widened(plan).curve(0, blocks * STRIP_TOKENS, step_tokens)
        slack, open_slack = _page_slack(plan, plan.formats, page_bytes), _page_slack(plan, plan.tails, page_bytes)
        resident = curve.resident_bytes
        if policy is not None:
            # Blocks are those that stay; sliding windows may hold all of theirs beside few of them.
            resident = blocks * plan.chosen_bytes + (blocks > 0) * (resident - blocks * plan.chosen_bytes).max()
        # While the last block is not full it lies open; a step over a border holds it and the next one.
        prices = resident + blocks * slack + (blocks > 0) * 2 * (plan.tail_bytes + open_slack)
        step_slack = num_blocks(step_tokens) * (slack * plan.has_windows + open_slack)
        if policy is not None:
            step_slack += (num_blocks(step_tokens) + 1) * page_bytes  # single strips
        return cls(
            by_blocks=tuple(prices.tolist()),
            block_bytes=plan.block_bytes + slack,
            transient_bytes=curve.transient_bytes + step_slack,
            can_share=plan.shares_prefixes,
            prompt_limit=prompt_limit,
            end_limit=end_limit,
            rollback_grain=plan.rollback_grain,
        )

    def resume_point(self, num_tokens: int, length: int) -> int:
        """Return the most tokens, at most ``num_tokens``, to which a sequence of ``length`` can go back."""
        if num_tokens == length:
            return length
        return num_tokens // self.rollback_grain * self.rollback_grain if self.rollback_grain else 0

    def dropped(self, before: int, num_tokens: int, *, ends_prompt: bool) -> int:
        """Return the blocks' worth of tokens that a policy has dropped of a prompt of which ``num_tokens`` are read."""
        limit = self.end_limit if ends_prompt else self.prompt_limit
        if limit is None:
            return before
        return before + max(num_blocks(num_tokens - STRIP_TOKENS * before - limit), 0)

    def held(self, num_tokens: int, dropped: int) -> int:
        """Return the most blocks that a sequence holds while it is read up to ``num_tokens``.

        A policy chooses from what stayed before and what a step brings, into new strips: both are held for a while.
        """
        blocks = num_blocks(num_tokens) - dropped
        if self.end_limit is None or self.prompt_limit is None or num_tokens - STRIP_TOKENS * dropped <= self.end_limit:
            return blocks
        return min(2 * blocks, _twice(self.prompt_limit))

    def price(self, blocks: int, shared_blocks: int = 0) -> int:
        """Return the private bytes of a sequence of ``blocks``, the first ``shared_blocks`` of them paid elsewhere."""
        return self.by_blocks[blocks] - shared_blocks * self.block_bytes

    def largest(self, capacity_bytes: int) -> int:
        """Return the most tokens that one sequence alone can have in ``capacity_bytes``."""
        room = capacity_bytes - self.transient_bytes
        fitting = int(np.searchsorted(np.asarray(self.by_blocks), room, side="right")) - 1
        return max(fitting, 0) * STRIP_TOKENS


def _twice(limit: int) -> int:
    """Return the blocks of a prompt cut to ``limit`` tokens and of the strips that the next choice is written to."""
    return 2 * (num_blocks(limit) + 1)


def _widened(plan: BoundPlan) -> BoundPlan:
    """Return ``plan`` with windows one block wider.

    While a step runs, each of its rows may have begun a block before the one that left the window is freed. The
    curve's transient covers the tokens of a step, not that every row may start in the middle of a block.
    """
    layers = (
        layer if layer.window is None else replace(layer, window=layer.window + STRIP_TOKENS) for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def _page_slack(plan: BoundPlan, formats: Sequence[PageFormat], page_bytes: int) -> int:
    """Return the bytes that one block may take beyond its strips because its ends share pages with others."""
    groups: dict[tuple[PageFormat, int | None, int | None], int] = {}
    read_later = {layer.kv_source for layer in plan.layers}
    for index, (layer, fmt) in enumerate(zip(plan.layers, formats, strict=False)):
        if layer.kv_source is None:
            key = fmt, layer.window, index if index in read_later else None
            groups[key] = groups.get(key, 0) + fmt.strip_bytes
    slack = 0
    for group_bytes in groups.values():
        # Groups lie behind one another from a page's start, so one begins at a multiple of this in its page.
        grain = math.gcd(group_bytes, page_bytes)
        slack += -(-(group_bytes + page_bytes - grain) // page_bytes) * page_bytes - group_bytes
    return slack
