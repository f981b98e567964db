"""KV stores by name: ``paged``, ``static`` (the same, all pages taken at the start) and ``contiguous``."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import KVPricing
from elbowroom.errors import PlanError, RequestError
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.capabilities import check_contiguous
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.contiguous import ContiguousStore
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena
from elbowroom.memory.tiers import StaticHostTier

KV_STORES = ("paged", "static", "contiguous")
Store = PagedStore | ContiguousStore
_ROWS_FOR_EACH = 4
"""Rows for every sequence that runs at once: parked sessions have theirs, too."""


def check_store(name: str, plans: Sequence[BoundPlan]) -> None:
    """Refuse a store that cannot keep sequences of these plans.

    Raises:
        PlanError: the contiguous store is to keep what is not plain, or several plans.
        RequestError: there is no such store.
    """
    if name not in KV_STORES:
        raise RequestError(f"there is no KV store {name!r}", f"choose one of {', '.join(KV_STORES)} (--kv-store)")
    if name != "paged" and len(plans) > 1:
        texts = ", ".join(repr(plan.plan.text) for plan in plans)
        raise PlanError(
            f"the {name} KV store keeps sequences of one plan, not of {texts}",
            "leave --kv-choice and --kv-relief out (kv_choices=, kv_relief=), or use --kv-store paged",
        )
    if name == "contiguous":
        check_contiguous(plans[0])


def make_stores(
    name: str,
    plans: Sequence[BoundPlan],
    arena: Arena,
    capacity: Capacity,
    model_id: bytes = b"",
    *,
    max_tokens: int,
    max_sequences: int,
) -> list[Store]:
    """Return a store for each plan; all share one capacity.

    Args:
        name: one of ``KV_STORES``.
        plans: checked by ``check_store``.
        arena: where pages come from.
        capacity: most bytes of all.
        model_id: fingerprint of the weights.
        max_tokens: most tokens of a sequence.
        max_sequences: that run at once.
    """
    if name == "contiguous":
        # A budget that is raised later gives the store up to twice its capacity (``EngineCore.max_kv_bytes``).
        fitting = 2 * capacity.num_bytes * STRIP_TOKENS // max(plans[0].block_bytes, 1)
        longest = max(min(max_tokens, fitting), STRIP_TOKENS)
        rows = _ROWS_FOR_EACH * max_sequences
        return [ContiguousStore(plans[0], arena, capacity, model_id, num_rows=rows, row_tokens=longest)]
    if name == "static":
        free = arena.ledger.available(arena.tier.name)
        if free is not None:  # pools end in the middle of a page
            capacity.num_bytes = min(capacity.num_bytes, free - arena.tier.page_bytes * len(plans[0].layers))
        arena = Arena(StaticHostTier(), arena.ledger, arena.clock)
    return [PagedStore(plan, arena, capacity, model_id) for plan in plans]


def price(
    name: str, plan: BoundPlan, max_tokens: int, step_tokens: int, page_bytes: int, namespace: bytes = b""
) -> KVPricing:
    """Return what sequences of ``plan`` cost in the store ``name``."""
    of = KVPricing.contiguous if name == "contiguous" else KVPricing.of
    return of(plan, max_tokens, step_tokens, page_bytes, namespace)
