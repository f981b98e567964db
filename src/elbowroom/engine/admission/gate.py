"""The gate: asks an admission policy about a waiting sequence, with all that it may look at."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.engine.admission.base import Outlook
from elbowroom.engine.sequence import SeqState
from elbowroom.engine.state import SchedulerState


def may_begin(seq: SeqState, running: Sequence[SeqState], state: SchedulerState, step_tokens: int) -> bool:
    """Return whether its policy lets ``seq`` begin beside ``running``; alone it always may, or nothing would ever run.

    Cached prefixes that running sequences hold are taken off the room, once, and off what each of them pays.
    """
    policy, account = state.admission_of(seq), state.account
    if not running or not policy.looks_ahead:
        return True
    index = account.index
    outlooks = [Outlook.of(each, step_tokens, account.shared_bytes(each)) for each in running]
    shared = 0 if seq.num_generated else index.firmly_held_bytes(account.match(seq))
    waited_s = 0.0 if seq.num_preemptions else state.now - seq.request.arrival_s
    candidate = Outlook.of(seq, step_tokens, shared, waited_s)
    return policy.admits(candidate, outlooks, account.usable_bytes - index.held_bytes)
