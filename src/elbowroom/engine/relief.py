"""Relief: which running sequence is turned into the engine's relief plan when memory is short."""

from __future__ import annotations

from collections.abc import Iterable

from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.sequence import SeqState


def relieve(running: Iterable[SeqState], account: KVAccount) -> bool:
    """Turn the sequence that frees most by it into the relief plan; False if none can be.

    So few long sequences are rounded rather than many short ones, and none twice. A request that named its plan keeps
    it; one that is preempted begins anew under the first plan.
    """
    plan = account.relief_plan
    if plan is None:
        return False
    room = account.free_bytes + account.conversion_bytes  # less than nothing, once the budget was lowered
    best: SeqState | None = None
    most = 0
    for seq in running:
        if seq.plan != 0 or seq.request.keeps_plan:
            continue
        gain, ahead = account.conversion_gain(seq, plan)
        if gain > most and ahead <= room:
            best, most = seq, gain
    if best is not None:
        account.convert(best, plan)
    return best is not None
