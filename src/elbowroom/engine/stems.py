"""Stems: prefixes that requests to come share are kept, at their exact length, until the last of those has ended.

Requests of an offline job say what later ones begin with (``Request.stems``). The first to compute such a prefix leaves
it in a slot of its own, from which the others branch, so that no token of it is computed twice; its full blocks lie in
the prefix index, pinned. No eviction touches it: it goes when nobody is left who needs it, at once, and earlier only if
the last sequence that runs could not go on otherwise (explicit pins of BatchLLM, arXiv 2412.03594).
"""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import num_blocks
from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.sequence import KeptStem, Parked, SeqState, StemKey
from elbowroom.engine.types import KVOp, Request, Stem


def expect(account: KVAccount, request: Request) -> None:
    """Note the stems of a request that was added."""
    for stem in request.stems or ():
        kept = account.stems.setdefault(_key(request, stem), KeptStem())
        kept.to_come = stem.to_come
        kept.num_live += request.sampling.n


def longest_stem(account: KVAccount, seq: SeqState) -> Parked | None:
    """Return the longest stem of ``seq`` that is stored."""
    for stem in reversed(seq.request.stems or ()):
        kept = account.stems.get(_key(seq.request, stem))
        if kept is not None and kept.stored is not None:
            return kept.stored
    return None


def next_stop(account: KVAccount, seq: SeqState, stop: int) -> int:
    """Return where a chunk up to ``stop`` has to end: at a stem, which is kept exactly as it is there."""
    for stem in seq.request.stems or ():
        if seq.num_computed < stem.num_tokens < stop and _is_wanted(account, seq, stem):
            return stem.num_tokens
    return stop


def keep_stem(account: KVAccount, seq: SeqState) -> None:
    """Store what ``seq`` has computed, if that is one of its stems, others need it, and there is room."""
    for stem in seq.request.stems or ():
        if stem.num_tokens == seq.num_computed and _is_wanted(account, seq, stem):
            account.cache(seq, stem.num_tokens // STRIP_TOKENS)
            _store(account, seq, account.stems[_key(seq.request, stem)])


def leave(account: KVAccount, seq: SeqState) -> None:
    """Note that ``seq`` has ended; what nobody needs any more is freed."""
    for stem in reversed(seq.request.stems or ()):
        key = _key(seq.request, stem)
        kept = account.stems.get(key)
        if kept is None:  # the store was emptied since
            continue
        kept.num_live -= 1
        if kept.num_live <= 0 and kept.to_come <= 0:
            _drop(account, kept)
            del account.stems[key]


def give_up_stems(account: KVAccount, seq: SeqState | None) -> bool:
    """Drop all stored stems that ``seq`` does not begin with, else those too; False if there were none.

    They stay wanted: whoever computes one next leaves it again.
    """
    own = set() if seq is None else {_key(seq.request, stem) for stem in seq.request.stems or ()}
    stored = {key: kept for key, kept in account.stems.items() if kept.stored is not None}
    for key in stored.keys() - own or stored.keys():
        _drop(account, stored[key])
    return bool(stored)


def awaits_leader(account: KVAccount, seq: SeqState, running: Sequence[SeqState]) -> bool:
    """Whether a running sequence is computing what comes next in ``seq``, and will share it.

    Without this rule all requests of a batch that share a prefix compute it, each for itself (vllm-project/vllm#2494).
    """
    if not seq.pricing.can_share:
        return False
    leaders = [other for other in running if other.num_computed < other.num_prompt and other.plan == seq.plan]
    if not leaders:
        return False
    if seq.request.stems is not None:
        wanted = {_key(seq.request, stem) for stem in seq.request.stems if _is_wanted(account, seq, stem)}
        return any(_computes(other, wanted) for other in leaders)
    if seq.sample > 0 and any(other.request.id == seq.request.id and other.sample == 0 for other in leaders):
        return True
    node = account.match(seq)
    depth = 0 if node is None else node.depth
    if depth >= (len(seq.tokens) - 1) // STRIP_TOKENS or depth >= len(seq.keys):
        return False
    return any(_brings(other, depth, seq.keys[depth]) for other in leaders)


def _computes(leader: SeqState, wanted: set[StemKey]) -> bool:
    return any(
        stem.num_tokens > leader.num_computed and _key(leader.request, stem) in wanted
        for stem in leader.request.stems or ()
    )


def _brings(leader: SeqState, depth: int, key: bytes) -> bool:
    """Whether ``leader`` will hand block ``depth`` to the index at the end of its prompt."""
    last = leader.num_prompt // STRIP_TOKENS
    return leader.request.stems is None and depth < min(last, len(leader.keys)) and leader.keys[depth] == key


def _is_wanted(account: KVAccount, seq: SeqState, stem: Stem) -> bool:
    """Whether others than ``seq`` need a stem that is not stored yet."""
    kept = account.stems.get(_key(seq.request, stem))
    if kept is None or kept.stored is not None or not account.caches(seq.plan) or seq.is_relieved:
        return False
    return kept.num_live + kept.to_come > 1


def _store(account: KVAccount, seq: SeqState, kept: KeptStem) -> None:
    node = account.ancestor(seq.shared, seq.num_computed)
    blocks = num_blocks(seq.num_computed)
    paid_bytes = seq.pricing.price(blocks)
    need = account.private_bytes(paid_bytes, node)
    while account.free_bytes < need:
        if not account.evict_one():
            return
    if node is not None:
        account.index.pin(node)
    account.used_bytes += need
    kept.stored = Parked(
        slot=account.new_slot(),
        asked_plan=seq.request.plan,
        plan=seq.plan,
        pricing=seq.pricing,
        tokens=seq.tokens[: seq.num_computed],
        shared=node,
        num_blocks=blocks,
        paid_bytes=paid_bytes,
        dropped=(),
        last_used=0,
    )
    account.ops.append(KVOp("fork", kept.stored.slot, seq.slot, seq.num_computed))


def _drop(account: KVAccount, kept: KeptStem) -> None:
    stored, kept.stored = kept.stored, None
    if stored is None:
        return
    account.used_bytes -= account.private_bytes(stored.paid_bytes, stored.shared)
    account.ops.append(KVOp("close", stored.slot))
    if stored.shared is not None:
        account.index.unpin(stored.shared)
        account.ops += account.index.discard(stored.shared)


def _key(request: Request, stem: Stem) -> StemKey:
    return request.plan, request.salt, request.adapter, stem.key
