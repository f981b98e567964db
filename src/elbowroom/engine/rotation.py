"""Rotation: running sequences that are put out for the first one that waits, where the order says so."""

from __future__ import annotations

from elbowroom.engine.admission.gate import may_begin
from elbowroom.engine.sequence import SeqState
from elbowroom.engine.state import SchedulerState


def give_ways(state: SchedulerState, max_sequences: int, step_tokens: int) -> list[SeqState]:
    """Return who has to go so that the head of the queue can begin; nobody if it could not even then.

    The last in order go first, and no more than are needed.
    """
    if not state.waiting or not state.running or state.leaving:
        return []
    head, account = state.waiting[0], state.account
    able = [seq for seq in reversed(state.running) if seq.rank > head.rank and not seq.is_loading]
    able = [seq for seq in able if state.order.gives_way(seq, head, state.now)]
    if not able:
        return []
    need = head.pricing.admission(len(head.tokens), (), 0, head.num_generated)[1]
    if head.saved is None:
        need = account.private_bytes(need, account.match(head))
    free, headroom = account.attainable_bytes(), sum([seq.pricing.block_bytes for seq in state.running])
    is_full, chosen = len(state.running) >= max_sequences, []
    for seq in able:
        if free >= need + headroom and not is_full:
            break
        chosen.append(seq)
        free += account.private_bytes(seq.paid_bytes, seq.shared)
        headroom -= seq.pricing.block_bytes
        is_full = False
    if not chosen or free < need + headroom:
        return []
    rest = [seq for seq in state.running if seq not in chosen]
    return chosen if may_begin(head, rest, state, step_tokens) else []
