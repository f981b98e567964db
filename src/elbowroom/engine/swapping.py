"""Swapping: sequences that go to the swap tier, and come back from there, as the scheduler keeps their books.

A sequence that is saved keeps its slot, and pays for it, until the executor says that its tokens are written
(*leaving*); one that comes back has its slot from the start and no rows until its tokens are read (*loading*). So
nothing depends on whether transfers stop the step. What was saved stays valid as long as the sequence lives: the next
save writes only what is new. A transfer that fails costs time, never tokens: they are computed again.
"""

from __future__ import annotations

from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.order import insert
from elbowroom.engine.sequence import Saved, SeqState
from elbowroom.engine.state import SchedulerState
from elbowroom.engine.types import KVOp, Moved


def wants_saving(seq: SeqState, state: SchedulerState) -> bool:
    """Return whether a sequence that has to go is saved. Where a policy chose what stays, it is computed again."""
    if seq.pricing.chooses or seq.num_computed == 0:
        return False
    held = seq.pricing.price(seq.num_blocks)
    known = min(seq.saved.num_tokens / seq.num_computed, 1.0) if _is_valid(seq) and seq.saved else 0.0
    return state.preemption.saves(seq.num_computed, held, round(held * (1.0 - known)))


def put_out(seq: SeqState, state: SchedulerState) -> None:
    """Begin to save a running sequence."""
    account = state.account
    if not _is_valid(seq):
        forget(seq, account)
    key = f"{seq.order}.{seq.sample}.{seq.slot}" if seq.saved is None else seq.saved.key
    seq.is_leaving = True
    state.running.remove(seq)
    state.leaving.append(seq)
    account.ops.append(KVOp("save", seq.slot, num_tokens=seq.num_computed, key=key, is_async=state.preemption.is_async))
    state.stats.swaps_out += 1


def stow(seq: SeqState, state: SchedulerState) -> None:
    """Begin to save a sequence that will be parked: its session goes on from there when its slot was needed."""
    if not wants_saving(seq, state):
        forget(seq, state.account)
        return
    if not _is_valid(seq):
        forget(seq, state.account)
    key = f"{seq.order}.{seq.sample}.{seq.slot}" if seq.saved is None else seq.saved.key
    seq.saved = Saved(key, seq.plan, seq.num_computed)
    state.account.ops.append(
        KVOp("save", seq.slot, num_tokens=seq.num_computed, key=key, is_async=state.preemption.is_async)
    )


def unstow(seq: SeqState, account: KVAccount) -> None:
    """Let ``seq`` go on from what the swap tier holds of its session, as far as that is the same."""
    session = seq.request.session
    stowed = None if session is None or seq.num_generated else account.stowed.get(session.key)
    if session is None or stowed is None or session.key in account.parked:
        return
    keep = 0
    if stowed.suits(seq.request):
        keep = account.resume_point(stowed.tokens, account.pricings[stowed.saved.plan], seq)
    if keep == 0:
        account.drop_stowed(session.key)
        return
    del account.stowed[session.key]
    seq.saved = Saved(stowed.saved.key, stowed.saved.plan, keep)


def come_back(seq: SeqState, state: SchedulerState) -> None:
    """Give a saved sequence its slot and begin to read its tokens; the caller has seen that they fit."""
    assert seq.saved is not None, "nothing is saved"
    state.account.load(seq, seq.saved, is_async=state.preemption.is_async)
    seq.is_loading = True
    state.stats.swaps_in += 1


def settle(moved: Moved, state: SchedulerState) -> None:
    """Take in that a transfer has ended, well or not."""
    state.stats.swapped_bytes += moved.num_bytes
    if moved.error is not None:
        state.stats.failed_swaps += 1
        _unsave(moved.key, state.account)
    group = state.leaving if moved.kind == "save" else state.running
    seq = next((each for each in group if each.slot == moved.slot), None)
    if seq is None:
        return  # it ended meanwhile
    if moved.error is not None:
        seq.saved = None
    if moved.kind == "load":
        seq.is_loading = False
        if moved.error is not None:
            seq.num_computed = 0
            state.account.ops.append(KVOp("open", seq.slot, plan=seq.plan))
        return
    if moved.error is None:
        seq.saved = Saved(moved.key, seq.plan, moved.num_tokens)
    state.leaving.remove(seq)
    seq.is_leaving, state.refused = False, None  # its bytes come free only now
    state.account.give_back(seq)
    insert(state.waiting, seq)


def forget(seq: SeqState, account: KVAccount) -> None:
    """Delete what the swap tier holds of a sequence."""
    if seq.saved is not None:
        account.ops.append(KVOp("forget", seq.slot, key=seq.saved.key))
        seq.saved = None


def _unsave(key: str, account: KVAccount) -> None:
    """A session's tokens could not be saved: keep it without, and make room for others where the tier is full."""
    for parked in account.parked.values():
        if parked.saved is not None and parked.saved.key == key:
            parked.saved = None
    for session in [each for each, stowed in account.stowed.items() if stowed.saved.key == key]:
        account.drop_stowed(session)
    if account.stowed:
        account.drop_stowed(next(iter(account.stowed)))


def _is_valid(seq: SeqState) -> bool:
    """Return whether what is saved has the format that the sequence has now."""
    return seq.saved is None or seq.saved.plan == seq.plan
