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


def come_back(seq: SeqState, state: SchedulerState) -> None:
    """Give a saved sequence its slot and begin to read its tokens; the caller has seen that they fit."""
    assert seq.saved is not None, "nothing is saved"
    state.account.load(seq, seq.saved, is_async=state.preemption.is_async)
    seq.is_loading = True
    state.stats.swaps_in += 1


def settle(moved: Moved, state: SchedulerState) -> None:
    """Take in that a transfer has ended, well or not."""
    state.stats.swapped_bytes += moved.num_bytes
    group = state.leaving if moved.kind == "save" else state.running
    seq = next((each for each in group if each.slot == moved.slot), None)
    if seq is None:
        return  # it ended meanwhile
    if moved.error is not None:
        state.stats.failed_swaps += 1
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
    seq.is_leaving = False
    state.account.give_back(seq)
    insert(state.waiting, seq)


def forget(seq: SeqState, account: KVAccount) -> None:
    """Delete what the swap tier holds of a sequence."""
    if seq.saved is not None:
        account.ops.append(KVOp("forget", seq.slot, key=seq.saved.key))
        seq.saved = None


def _is_valid(seq: SeqState) -> bool:
    """Return whether what is saved has the format that the sequence has now."""
    return seq.saved is None or seq.saved.plan == seq.plan
