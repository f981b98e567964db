"""Conversion: the tokens of a sequence are kept under another plan, a few blocks at a time.

Each run of blocks is decoded, written to the other store as a step would write it, and freed here, so that hardly
more is held on the way than in the end.
"""

from __future__ import annotations

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import OutOfBudget, PlanError
from elbowroom.kv.base import KVHandle, KVStep
from elbowroom.kv.bound import owns_kv
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.units import format_bytes

RUN_BLOCKS = 4
"""Blocks that are written before as many are freed."""


def convert(source: PagedStore, handle: KVHandle, target: PagedStore) -> KVHandle:
    """Return a sequence of ``target`` with the tokens of ``handle``, which is closed; its bytes go on the way.

    What the codec of ``source`` has rounded stays rounded.

    Raises:
        PlanError: one of the plans chooses among tokens.
        OutOfBudget: there is no room to begin with; nothing changes then.
    """
    check_conversion(source.plan.plan, target.plan.plan)
    made, total = target.open(), source.num_tokens(handle)
    try:
        for start in range(0, total, RUN_BLOCKS * STRIP_TOKENS):
            stop = min(start + RUN_BLOCKS * STRIP_TOKENS, total)
            _append(source, handle, target, made, start, stop)
            source.forget(handle, stop // STRIP_TOKENS)
    except BaseException:
        target.close(made)
        raise
    source.close(handle)
    return made


def check_conversion(source: KVPlan, target: KVPlan) -> None:
    """Refuse to turn sequences of one plan into another.

    Raises:
        PlanError: one of them chooses among tokens, heads or channels, or both are the same.
    """
    for plan in (source, target):
        if plan.policy is not None or plan.heads is not None or plan.channels is not None:
            raise PlanError(
                f"sequences of plan {source.text!r} cannot be turned into {target.text!r}: {plan.text!r} chooses "
                "when a prompt ends, with queries that are gone by then",
                "use plans of a codec (and quest) alone, such as plain(bf16) and kivi(4,4,64)",
            )
    if source == target:
        raise PlanError(f"plan {source.text!r} is no relief from itself", "name one that takes fewer bytes")


def _append(source: PagedStore, handle: KVHandle, target: PagedStore, made: KVHandle, start: int, stop: int) -> None:
    """Write tokens ``start .. stop - 1`` of one sequence to the end of the other."""
    positions = np.arange(start, stop, dtype=np.int64)
    step = KVStep((made,), np.asarray([0, stop - start], dtype=np.int32), positions)
    missing = target.reserve(step)
    if missing is not None:
        raise OutOfBudget(
            f"turning {stop} tokens into plan {target.plan.plan} needs {format_bytes(missing.needed_bytes)} of KV "
            f"memory; {format_bytes(missing.available_bytes)} could be had",
            "raise memory= (--memory)",
        )
    for layer, spec in enumerate(target.plan.layers):
        if owns_kv(spec):
            target.write(layer, *source.read(handle, layer, start, stop), step)
    target.end_step(step)
