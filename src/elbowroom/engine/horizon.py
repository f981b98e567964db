"""Horizon: how often a step of decode rows may be repeated before the scheduler has to decide anything.

That is what lets a simulation go from event to event. A repetition is allowed only where the steps one by one would
have been the same: no limit is reached before the last, all new blocks fit without anything being given up, and
nobody who waits could begin.
"""

from __future__ import annotations

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import num_blocks
from elbowroom.engine.sequence import SeqState
from elbowroom.engine.state import Rows, SchedulerState
from elbowroom.engine.types import Row


def repeatable_steps(rows: Rows, state: SchedulerState) -> int:
    """Return how often the step may be done, itself included; the head of the queue was refused if there is one."""
    if state.leaving or any(seq.is_loading for seq in state.running):
        return 1  # a transfer may end at any time
    most = min([_repeats(seq, row) for seq, row in rows], default=1)
    if state.waiting and state.order.interval:
        most = min(most, state.order.interval)  # somebody may have to give way
    if state.waiting and state.refused is state.waiting[0]:
        most = min(most, max(state.asks_again_at - state.num_steps, 1))
    if most <= 1:
        return 1
    within = min([max(seq.num_blocks * STRIP_TOKENS, row.start + 1) - row.start for seq, row in rows])
    free_bytes = state.account.free_bytes
    if most <= within or _growth_bytes(rows, most) <= free_bytes:
        return most
    # What surely fits will do, if it is not the most: all grow by so much at once.
    each = max([seq.pricing.block_bytes for seq, _ in rows])
    surely = (free_bytes // (each * len(rows)) - 1) * STRIP_TOKENS
    return surely if within < surely < most and _growth_bytes(rows, surely) <= free_bytes else within


def _repeats(seq: SeqState, row: Row) -> int:
    """Return how often ``row`` may be repeated before it would be another one."""
    # One that ends early is cut back, and a sliding window may have dropped what lies before.
    if row.kind != "decode" or row.prompt or (seq.stop_token_ids and not seq.pricing.can_share):
        return 1
    last = seq.limit - 1
    if seq.request.num_output_tokens is not None:
        last = min(last, seq.num_prompt + max(seq.request.num_output_tokens, 1) - 1)
    if seq.pricing.interval:
        last = min(last, seq.pricing.next_choice(seq.num_prompt, row.start) - 1)
    return last - row.start


def _growth_bytes(rows: Rows, steps: int) -> int:
    """Return what the rows would have to pay to be done ``steps`` times."""
    return sum(
        [
            max(seq.pricing.price(num_blocks(row.start + steps), seq.dropped) - seq.paid_bytes, 0)
            for seq, row in rows
            if row.start + steps > seq.num_blocks * STRIP_TOKENS
        ]
    )
