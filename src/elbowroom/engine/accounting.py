"""KVPricing: what sequences cost in bytes, as the scheduler counts; integers only.

The numbers come from the plan's curve, rounded up to whole pages, so that a schedule that fits here fits the store.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.kv.bound import BoundPlan, owns_kv
from elbowroom.kv.conversion import RUN_BLOCKS
from elbowroom.kv.row_space import most_pages, with_ahead


def num_blocks(num_tokens: int) -> int:
    """Return the blocks that hold ``num_tokens``."""
    return -(-num_tokens // STRIP_TOKENS)


Dropped = tuple[int, ...]
"""Blocks' worth of tokens that a policy dropped of each layer it chooses from; empty: nothing."""


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
    layer_bytes: tuple[int, ...] = ()
    """Bytes of one block of each layer that a policy chooses from; empty: nothing is ever dropped."""
    open_bytes: tuple[int, ...] = ()
    """The same while a prompt is read, where its blocks wait for its end to be sealed; empty: they do not."""
    prompt_limits: tuple[int, ...] = ()
    """Most tokens of each such layer that stay behind a part of a prompt."""
    end_limits: tuple[int, ...] = ()
    """The same behind its end."""
    interval: int = 0
    """Generated tokens behind which a policy chooses anew; 0: never."""
    rollback_grain: int = 1
    """Tokens of whose multiples sequences can go back to any; 0: only to their beginning."""
    namespace: bytes = b""
    """Fingerprint of model and plan: prefix keys of different ones never meet."""
    prices: npt.NDArray[np.int64] = field(init=False, compare=False, repr=False)
    """``by_blocks`` as an array."""

    def __post_init__(self) -> None:
        """Make the array once: admission looks at it in every step."""
        object.__setattr__(self, "prices", np.asarray(self.by_blocks, dtype=np.int64))

    @classmethod
    def of(
        cls, plan: BoundPlan, max_tokens: int, step_tokens: int, page_bytes: int, namespace: bytes = b""
    ) -> KVPricing:
        """Return the prices of ``plan`` for sequences of up to ``max_tokens``."""
        blocks = np.arange(num_blocks(max_tokens) + 1, dtype=np.int64)
        curve = _widened(plan).curve(0, blocks * STRIP_TOKENS, step_tokens, renews=False)
        slack, open_slack = _page_slack(plan, plan.formats, page_bytes), _page_slack(plan, plan.tails, page_bytes)
        resident = curve.resident_bytes
        if plan.chooses:
            # What is dropped is taken off; sliding windows may hold all of theirs beside few blocks that stay.
            resident = blocks * plan.chosen_bytes + (blocks > 0) * (resident - blocks * plan.chosen_bytes).max()
            # Single strips, which take the place of groups, end in pages of their own once more.
            windows = [layer.window // STRIP_TOKENS for layer in plan.layers if layer.window is not None]
            resident = resident + (blocks > 0) * (max(windows, default=0) + 4) * slack
        # While the last block is not full it lies open; a step over a border holds it and the next one.
        prices = resident + blocks * slack + (blocks > 0) * 2 * (plan.tail_bytes + open_slack)
        step_slack = num_blocks(step_tokens) * (slack * plan.has_windows + open_slack)
        if plan.chooses:
            step_slack += (num_blocks(step_tokens) + 1) * page_bytes  # single strips
        chosen = plan.chosen_layers
        prompt_limits, end_limits = (plan.limits(ends_prompt=ends)[chosen].tolist() for ends in (False, True))
        layer_bytes = [plan.formats[layer].strip_bytes for layer in chosen]
        # What strips give back together must not exceed what their group had: round down.
        shares = [slack * strip // max(plan.chosen_bytes, 1) for strip in layer_bytes]
        open_bytes = [plan.tails[layer].strip_bytes for layer in chosen] if plan.defers else []
        open_shares = [-(-open_slack * strip // max(sum(open_bytes), 1)) for strip in open_bytes]
        return cls(
            by_blocks=tuple(prices.tolist()),
            block_bytes=plan.block_bytes + slack,
            transient_bytes=curve.transient_bytes + step_slack,
            can_share=plan.shares_prefixes,
            layer_bytes=tuple(strip + share for strip, share in zip(layer_bytes, shares, strict=True)),
            open_bytes=tuple(strip + share for strip, share in zip(open_bytes, open_shares, strict=True)),
            prompt_limits=tuple(prompt_limits),
            end_limits=tuple(end_limits),
            interval=plan.interval,
            rollback_grain=plan.rollback_grain,
            namespace=namespace,
        )

    @classmethod
    def contiguous(
        cls, plan: BoundPlan, max_tokens: int, step_tokens: int, page_bytes: int, namespace: bytes = b""
    ) -> KVPricing:
        """Return the prices of ``plan``, a plain one, in the contiguous store.

        Each layer ends in a page of its own, and gets some ahead. Nothing is shared, so prefixes are not cached, and
        whoever forks a session pays for all of the copy.
        """
        blocks = range(num_blocks(max_tokens) + 1)
        prices = [int(with_ahead(most_pages(plan, count * STRIP_TOKENS, page_bytes)).sum()) for count in blocks]
        transient = 0
        for layer, fmt in zip(plan.layers, plan.formats, strict=True):
            if layer.window is not None and owns_kv(layer):  # what comes before what leaves the window goes
                transient += -(-num_blocks(step_tokens) * fmt.strip_bytes // page_bytes) + 1
        return cls(
            by_blocks=tuple(price * page_bytes for price in prices),
            block_bytes=plan.block_bytes,
            transient_bytes=transient * page_bytes,
            can_share=False,
            rollback_grain=plan.rollback_grain,
            namespace=namespace,
        )

    @property
    def chooses(self) -> bool:
        """Whether a policy drops tokens of prompts."""
        return bool(self.layer_bytes)

    @property
    def conversion_bytes(self) -> int:
        """What a sequence that goes over to this plan takes before it frees anything."""
        return self.by_blocks[min(RUN_BLOCKS, len(self.by_blocks) - 1)]

    def resume_point(self, num_tokens: int, length: int) -> int:
        """Return the most tokens, at most ``num_tokens``, to which a sequence of ``length`` can go back."""
        if num_tokens == length:
            return length
        return num_tokens // self.rollback_grain * self.rollback_grain if self.rollback_grain else 0

    def dropped(self, before: Dropped, num_tokens: int, *, ends_prompt: bool) -> Dropped:
        """Return what a policy has dropped of a prompt of which ``num_tokens`` are read; ``before``: until now."""
        limits = self.end_limits if ends_prompt else self.prompt_limits
        made = tuple(
            [
                gone + max(num_blocks(num_tokens - STRIP_TOKENS * gone - limit), 0)
                for gone, limit in zip(before or (0,) * len(limits), limits, strict=True)
            ]
        )
        return made if any(made) else ()

    def price(self, blocks: int, dropped: Dropped = ()) -> int:
        """Return the bytes of a sequence of ``blocks``, all private, without what was dropped of them."""
        gone = sum([count * cost for count, cost in zip(dropped, self.layer_bytes, strict=False)])
        return self.by_blocks[blocks] - gone

    def peak_bytes(self, num_tokens: int, dropped: Dropped, computed: int = 0) -> int:
        """Return the most bytes of a sequence while a prompt is read up to ``num_tokens``.

        A policy chooses from what stayed before and what a step brings, into new strips: both are held for a while.

        Args:
            num_tokens: of the sequence then.
            dropped: what was dropped of it until now.
            computed: tokens that it has now.
        """
        blocks = num_blocks(num_tokens)
        price = self.price(blocks, dropped)
        if not self.open_bytes and self.dropped(dropped, num_tokens, ends_prompt=True) == dropped:
            return price
        gone, open_bytes = dropped or (0,) * len(self.layer_bytes), self.open_bytes or self.layer_bytes
        limits = zip(self.prompt_limits, self.end_limits, strict=True)
        even = len(set(self.prompt_limits)) == 1
        for count, cost, open_cost, (within, end) in zip(gone, self.layer_bytes, open_bytes, limits, strict=True):
            held, most = blocks - count, num_blocks(within) + 1
            # One layer over its limit lets all be written anew; where limits differ, that may be this one in full.
            fresh = min(held, num_blocks(end) + 1) if even else held
            stays = held
            if held >= most:
                stays, fresh = max(num_blocks(computed) - count, most), most
            price += stays * open_cost + fresh * max(open_cost, cost) - held * cost
        return price

    def next_choice(self, prompt_tokens: int, num_tokens: int) -> int:
        """Return the tokens of a sequence behind its first choice after ``num_tokens``, its prompt included."""
        return num_tokens + self.interval - (num_tokens - prompt_tokens) % self.interval

    def renewal_bytes(self, num_tokens: int, dropped: Dropped) -> int:
        """Return the most bytes of a sequence while a policy chooses anew behind generated tokens.

        Args:
            num_tokens: of the sequence then.
            dropped: what was dropped of it until now.
        """
        blocks = num_blocks(num_tokens)
        price, after = self.price(blocks, dropped), self.dropped(dropped, num_tokens, ends_prompt=True)
        if self.open_bytes or after == dropped:  # sealed blocks go or stay; the open one is paid twice in any case
            return price
        return price + sum([(blocks - gone) * cost for gone, cost in zip(after, self.layer_bytes, strict=True)])

    def generation_bytes(self, prompt_tokens: int, num_tokens: int) -> int:
        """Return the most bytes of a sequence from the end of its prompt until it has ``num_tokens``, all private.

        With choices on the way it never holds more than at the last one or behind it: blocks come one by one, and each
        choice drops as many as came since the one before, or fewer.
        """
        chosen, most = prompt_tokens, 0
        if self.interval and num_tokens >= prompt_tokens + self.interval:
            chosen = self.next_choice(prompt_tokens, num_tokens) - self.interval
            before = self.dropped((), chosen - self.interval, ends_prompt=True)
            most = self.renewal_bytes(chosen, before)
        return max(most, self.price(num_blocks(num_tokens), self.dropped((), chosen, ends_prompt=True)))

    def admission(
        self, num_tokens: int, dropped: Dropped, computed: int = 0, num_generated: int = 0
    ) -> tuple[int, int]:
        """Return the blocks that a sequence of ``num_tokens``, to be read, has paid for at once, and their bytes.

        Where something will be chosen it holds fewer, at times twice: then it pays for the peak, and each step looks.
        The last ``num_generated`` of them, of a sequence that is computed again, are no prompt.
        """
        paid = self.peak_bytes(num_tokens - num_generated, dropped, computed)
        if num_generated:
            paid = max(paid, self.generation_bytes(num_tokens - num_generated, num_tokens))
        return (0 if self.chooses else num_blocks(num_tokens)), paid

    def largest(self, capacity_bytes: int, prompt_tokens: int = 0) -> int:
        """Return the most tokens that one sequence alone can have in ``capacity_bytes``, once its prompt is read."""
        room, blocks = capacity_bytes - self.transient_bytes, range(len(self.by_blocks))
        fitting = bisect.bisect_right(
            blocks, room, key=lambda count: self.generation_bytes(prompt_tokens, count * STRIP_TOKENS)
        )
        return max(fitting - 1, 0) * STRIP_TOKENS


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
