"""Room: what is given up, and in which order, when the next block of a running sequence does not fit."""

from __future__ import annotations

from collections.abc import Callable

from elbowroom.engine.order import insert
from elbowroom.engine.relief import relieve
from elbowroom.engine.sequence import SeqState
from elbowroom.engine.state import SchedulerState
from elbowroom.engine.stems import give_up_stems
from elbowroom.engine.swapping import put_out, wants_saving


def make_room(need: Callable[[], int], seq: SeqState | None, state: SchedulerState) -> bool:
    """Free bytes until ``need`` fits, preempting only what is younger than ``seq`` (anything when it is None).

    What ``seq`` needs is less once it has gone over to the relief plan.
    """
    account = state.account
    while account.free_bytes < need():
        if account.evict_one():
            continue
        if relieve(state.running, account):
            state.stats.reliefs += 1
            continue
        leaving = sum([account.private_bytes(each.paid_bytes, each.shared) for each in state.leaving])
        if seq is not None and account.free_bytes + leaving >= need():
            return False
        victim = _victim(seq, state)
        if victim is None:
            if len(state.running) <= 1 and not state.leaving and give_up_stems(account, seq):
                continue
            return False
        preempt(victim, state, may_save=seq is not None)
    return True


def _victim(seq: SeqState | None, state: SchedulerState) -> SeqState | None:
    """Return which running sequence younger than ``seq`` goes: of the younger half the one that holds most.

    When memory runs short the youngest alone, who holds least, seldom frees enough, and the next ones follow it.
    One that began only because it fits to its limit goes after those that did not ask for so much.
    """
    able = [each for each in state.running if not each.is_loading]
    if not able or able[-1] is seq:
        return None
    able = _unguarded(able, seq or able[0], state)
    last = able[-1]
    younger = [each for each in able[len(able) // 2 :] if each.request.priority == last.request.priority]
    if seq is not None:
        younger = [each for each in younger if each.rank > seq.rank]
    account = state.account
    return max(younger, key=lambda each: account.private_bytes(each.paid_bytes, each.shared), default=last)


def _unguarded(able: list[SeqState], oldest: SeqState, state: SchedulerState) -> list[SeqState]:
    """Return those that asked for no room to their limits, if one is younger than ``oldest`` and as urgent as any."""
    found = [each for each in able if not state.admission_of(each).guards]
    if found and found[-1].rank > oldest.rank and found[-1].request.priority == able[-1].request.priority:
        return found
    return able


def preempt(seq: SeqState, state: SchedulerState, *, may_save: bool = True) -> None:
    """Take a running sequence's blocks away; they are saved, or computed again later."""
    seq.num_preemptions += 1
    state.stats.preemptions += 1
    state.refused = None
    if may_save and wants_saving(seq, state):
        put_out(seq, state)
        return
    state.account.give_back(seq)
    state.running.remove(seq)
    insert(state.waiting, seq)
