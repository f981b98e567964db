"""PoolSet: the strip pools of a store, one for each kind of layer, and what is asked of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import BudgetError, OutOfBudget
from elbowroom.kv.base import Shortfall
from elbowroom.kv.plan import BoundPlan
from elbowroom.kv.pool import StripPool
from elbowroom.kv.sequence import Table, blocks_of
from elbowroom.memory.arena import Arena
from elbowroom.units import format_bytes


class PoolSet:
    """Layers with the same format and the same sliding window share a pool: what expires together lies together.

    Args:
        plan: layers and formats.
        arena: where the strips lie.
        owner: ledger account.
        capacity_bytes: most bytes of pages to hold.
    """

    def __init__(self, plan: BoundPlan, arena: Arena, owner: str, capacity_bytes: int) -> None:
        self._arena = arena
        self.capacity_bytes = capacity_bytes
        self.source_of = [index if each.kv_source is None else each.kv_source for index, each in enumerate(plan.layers)]
        """For each layer the one whose strips it reads."""
        members: dict[tuple[object, int | None], list[int]] = {}
        for index in sorted(set(self.source_of)):
            members.setdefault((plan.formats[index], plan.layers[index].window), []).append(index)
        self._pools: list[StripPool] = []
        for (_, window), layers in members.items():
            fmt = plan.formats[layers[0]]
            # Address space is free on an elastic tier: every pool could hold the whole capacity, with slack for
            # groups that live on with only some of their layers. On a static one each gets its share.
            room = 2 * capacity_bytes
            if not arena.tier.elastic:
                room = capacity_bytes * fmt.strip_bytes * len(layers) // plan.block_bytes
            self._pools.append(StripPool(arena, owner, fmt, layers, room, window))
        self.windowed = [pool for pool in self._pools if pool.window is not None]
        number_of = {layer: number for number, pool in enumerate(self._pools) for layer in pool.layers.tolist()}
        self.number_of = [number_of[source] for source in self.source_of]
        """For each layer the number of the pool that holds what it reads."""

    def __iter__(self) -> Iterator[StripPool]:
        """Iterate over the pools, in the order of their first layers."""
        return iter(self._pools)

    def __len__(self) -> int:
        """Return the number of pools."""
        return len(self._pools)

    def of_layer(self, layer: int) -> StripPool:
        """Return the pool that holds what ``layer`` reads."""
        return self._pools[self.number_of[layer]]

    @property
    def live_bytes(self) -> int:
        """Bytes of pages that hold strips."""
        return sum(pool.live_bytes for pool in self._pools)

    @property
    def free_bytes(self) -> int:
        """Bytes of pages that are resident and hold no strip."""
        return sum(pool.free_bytes for pool in self._pools)

    def shortfall(self, counts: Sequence[int]) -> Shortfall | None:
        """Return why ``counts[i]`` groups of pool i cannot be had, or None."""
        for pool, count in zip(self._pools, counts, strict=True):
            if count > pool.num_free_groups:
                return Shortfall(count * pool.group_bytes, pool.num_free_groups * pool.group_bytes)
        available = self._available()
        # A group begins and ends somewhere in a page. Mostly there is room for the worst case: no need to look closer.
        slack = 2 * self._arena.tier.page_bytes
        worst = sum(count * (pool.group_bytes + slack) for pool, count in zip(self._pools, counts, strict=True))
        if worst <= available:
            return None
        cost = sum(pool.cost(count) for pool, count in zip(self._pools, counts, strict=True))
        return Shortfall(cost, max(available, 0)) if cost and cost > available else None

    def take(self, counts: Sequence[int]) -> list[Table]:
        """Take ``counts[i]`` groups of pool i, or nothing at all.

        Raises:
            OutOfBudget: the pages do not fit.
        """
        taken: list[Table] = []
        try:
            taken.extend(pool.take(count) for pool, count in zip(self._pools, counts, strict=True))
        except BudgetError:
            for pool, entries in zip(self._pools, taken, strict=False):
                pool.release(entries)
            raise
        return taken

    def take_for(self, what: str, counts: Sequence[int]) -> list[Table]:
        """Take groups for ``what``, or explain in its words why not.

        Raises:
            OutOfBudget: they do not fit; nothing changes then.
        """
        missing = self.shortfall(counts)
        if missing is not None:
            raise OutOfBudget(
                f"{what} needs {format_bytes(missing.needed_bytes)} of KV memory; "
                f"{format_bytes(missing.available_bytes)} could be had",
                "raise memory= (--memory), or close sequences first",
            )
        return self.take(counts)

    def share(self, table: Table) -> None:
        """Hold all strips of ``table [num_layers, blocks]`` once more."""
        for pool in self._pools:
            pool.share(table[pool.layers])

    def release(self, table: Table) -> int:
        """Let go of all strips of ``table [num_layers, blocks]``; return the bytes of pages freed."""
        return sum(pool.release(table[pool.layers]) for pool in self._pools)

    def pieces(self, start: int, stop: int) -> list[tuple[int, StripPool, int, int]]:
        """Return layer, pool, first and end block of what a sequence of ``stop`` tokens holds from ``start`` on."""
        return [
            (layer, pool, max(start // STRIP_TOKENS, pool.expired_blocks(stop)), blocks_of(stop))
            for layer, source in enumerate(self.source_of)
            if source == layer
            for pool in [self.of_layer(layer)]
        ]

    def close(self) -> None:
        """Give all ranges back."""
        for pool in self._pools:
            pool.close()

    def _available(self) -> int:
        """Return the bytes by which ``live_bytes`` may grow."""
        room = self.capacity_bytes - self.live_bytes
        free = self._arena.ledger.available(self._arena.tier.name)
        # Free pages of the arena are resident already: they are taken over, or given back before others are charged.
        return room if free is None else min(room, free + self._arena.free_bytes())
