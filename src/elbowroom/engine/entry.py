"""Entry: how a waiting sequence gets its slot, on what is stored already, if its known tokens fit beside what runs."""

from __future__ import annotations

from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.sequence import Parked, SeqState
from elbowroom.engine.state import SchedulerState
from elbowroom.engine.stems import longest_stem
from elbowroom.engine.swapping import come_back, unstow


def enter(seq: SeqState, state: SchedulerState) -> bool:
    """Give ``seq`` a slot with all blocks of its known tokens paid; False if they do not fit."""
    if seq.saved is None:
        unstow(seq, state.account)
    if seq.saved is not None:
        paid_bytes = state.account.pricings[seq.saved.plan].admission(len(seq.tokens), (), 0, seq.num_generated)[1]
        if not _fits(paid_bytes, seq, state):
            return False
        come_back(seq, state)
        return True
    return _resume(seq, state) or _graft(seq, state) or _open(seq, state)


def _open(seq: SeqState, state: SchedulerState) -> bool:
    """Open a slot behind the longest cached prefix."""
    account = state.account
    node = account.match(seq)
    if node is not None:
        account.index.pin(node)
    paid_bytes = seq.pricing.admission(len(seq.tokens), (), 0, seq.num_generated)[1]
    if _fits(account.private_bytes(paid_bytes, node), seq, state):
        account.open(seq, node)
        return True
    if node is not None:
        account.index.unpin(node)
    return False


def _resume(seq: SeqState, state: SchedulerState) -> bool:
    """Go on in the session's own parked slot, or branch from its parent's, where one is still stored."""
    session, account = seq.request.session, state.account
    if session is None or seq.num_generated:
        return False
    own = account.use_parked(session.key)
    if own is not None and own.suits(seq.request):
        if not _fits(account.take_over_bytes(own, seq), seq, state, own):
            return False
        account.take_over(seq, session.key)
        return True
    parent = account.use_parked(session.parent)
    return parent is not None and parent.suits(seq.request) and _branch(seq, parent, state, parent)


def _graft(seq: SeqState, state: SchedulerState) -> bool:
    """Branch from the longest stem of its that is kept."""
    stem = longest_stem(state.account, seq)
    return stem is not None and _branch(seq, stem, state, None)


def _branch(seq: SeqState, parent: Parked, state: SchedulerState, parked: Parked | None) -> bool:
    account: KVAccount = state.account
    keep = account.num_kept(parent, seq)
    if keep == 0:
        return False
    node = account.ancestor(parent.shared, keep)
    paid_bytes = parent.pricing.admission(len(seq.tokens), parent.dropped, keep)[1]
    if node is not None:
        account.index.pin(node)
    if _fits(account.private_bytes(paid_bytes, node), seq, state, parked):
        account.branch(seq, parent, node, keep)
        return True
    if node is not None:
        account.index.unpin(node)
    return False


def _fits(need: int, seq: SeqState, state: SchedulerState, keep: Parked | None = None) -> bool:
    """Make room for an admission; one free block for every running sequence must remain, and none is preempted."""
    account = state.account
    headroom = sum([other.pricing.block_bytes for other in state.running])
    headroom *= state.return_blocks if seq.num_preemptions else 1
    if account.free_bytes < need + headroom and account.attainable_bytes(keep) < need + headroom:
        return False
    while account.free_bytes < need:
        if not account.evict_one(keep):
            return False
    return True
