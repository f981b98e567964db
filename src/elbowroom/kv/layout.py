"""PoolSet: the strip pools of a store, by kinds of layers and strips, and what is asked of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Counts
from dataclasses import dataclass, field

import numpy as np

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.errors import BudgetError, OutOfBudget
from elbowroom.kv.base import Shortfall
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.extents import Ask
from elbowroom.kv.holding import Blocks, Extent, Holding, blocks_of
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.kv.sequence import Rows, Sequence, Table
from elbowroom.memory.arena import Arena
from elbowroom.units import format_bytes

_TAIL_SHARE = 8
"""On a tier where address space is not free, tails and staging get one part in so many."""


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """Rows of sequences' tables that hold the same blocks, in strips of one pool."""

    pool: StripPool
    rows: Rows
    """For most lanes, layers."""
    holding: Holding
    users: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Of a lane of single strips, the rows that get some for the tokens that a policy keeps."""

    @property
    def first_row(self) -> int:
        """Any of the rows."""
        return int(self.rows[0])

    def ask(self, sequence: Sequence, blocks: Blocks) -> Ask:
        """Return what to ask the pool for, so that ``blocks`` of a sequence come to lie behind those before them.

        Whoever does not say how long a sequence will be gets room to grow to twice its length.
        """
        if blocks.size == 0:
            return Ask(0)
        first = int(blocks[0])
        after = -1
        if first and sequence.holds(self.first_row, first - 1):
            after = self.pool.group_of(int(sequence.table[self.first_row, first - 1]))
        if self.holding.part not in ("all", "sealed"):
            return Ask(blocks.size, after)
        end = max(blocks_of(sequence.expected_tokens), 2 * first, int(blocks[-1]) + 1)
        if self.holding.window is not None:
            end = min(end, first + self.holding.window // STRIP_TOKENS + 1)
        return Ask(blocks.size, after, end - first)


class PoolSet:
    """Layers with the same formats and the same sliding window share a pool: what expires together lies together.

    Rows of a sequence's table are the layers; where strips are sealed, as many rows follow for the tails of the
    layers, and one for each staging lane.

    Args:
        plan: layers and formats.
        arena: where the strips lie.
        owner: ledger account.
        capacity: most bytes of pages to hold, these and those of others that share it.
    """

    def __init__(self, plan: BoundPlan, arena: Arena, owner: str, capacity: Capacity) -> None:
        self._plan, self._arena, self._owner = plan, arena, owner
        self.capacity = capacity
        capacity.holders.append(self)
        self.source_of = [index if each.kv_source is None else each.kv_source for index, each in enumerate(plan.layers)]
        """For each layer the one whose strips it reads."""
        self.main: list[Lane] = []
        """What layers read: all their blocks, or those that are sealed."""
        self.tails: list[Lane] = []
        """For each main lane, the tails of its layers; empty where tokens are written one by one."""
        self.staging: list[Lane] = []
        """Blocks that all layers of a pool use one after the other, in single strips; see ``Holding``."""
        self.fresh: list[Lane] = []
        """Sealed strips for what a policy keeps."""
        for layers in self._members():
            self._add(layers)
        self._lanes = [*self.main, *self.tails, *self.staging, *self.fresh]
        self.pools = [lane.pool for lane in (*self.main, *self.tails)]
        self.dropping = [lane for lane in self._lanes if lane.holding.drops]
        self.num_rows = self._next_row()
        """Rows of a sequence's table."""
        number_of = {layer: number for number, lane in enumerate(self.main) for layer in lane.rows.tolist()}
        self.number_of = [number_of[source] for source in self.source_of]
        """For each layer the number of the main lane that holds what it reads."""

    def _members(self) -> list[list[int]]:
        """Return the layers with keys of their own, those that share a pool together.

        A layer that others read later cannot share what layers use one after the other: it has a pool of its own.
        """
        members: dict[tuple[object, int | None, int | None], list[int]] = {}
        read_later = {source for layer, source in enumerate(self.source_of) if layer != source}
        for index in sorted(set(self.source_of)):
            alone = index if index in read_later else None
            members.setdefault((self._plan.formats[index], self._plan.layers[index].window, alone), []).append(index)
        return list(members.values())

    def _add(self, layers: list[int]) -> None:
        plan, rows = self._plan, np.asarray(layers, dtype=np.int64)
        fmt, window = plan.formats[layers[0]], plan.layers[layers[0]].window
        share = fmt.strip_bytes * len(layers) / plan.block_bytes
        if not plan.tails:
            self._add_open(self._pool(fmt, layers, share), rows, window)
            return
        chosen = plan.chooses and window is None
        # Where prompts wait for their end, tails and staging hold the most of them.
        tail_share = 0.5 if chosen else 1 / _TAIL_SHARE
        sealed = self._pool(fmt, layers, share * (1 - tail_share))
        tail = self._pool(plan.tails[layers[0]], layers, share * tail_share)
        tails = rows + len(plan.layers)
        self.main.append(Lane(sealed, rows, Holding("sealed", window, chosen)))
        self.tails.append(Lane(tail, tails, Holding("tail", chosen=chosen)))
        if not chosen:
            self.staging.append(Lane(tail, self._new_row(), Holding("staging")))
            return
        self.staging.append(Lane(tail, self._new_row(), Holding("staging", chosen=True), tails))
        self.fresh.append(Lane(sealed, self._new_row(), Holding("fresh", chosen=True), rows))

    def _add_open(self, pool: StripPool, rows: Rows, window: int | None) -> None:
        if not self._plan.chooses or window is not None:
            self.main.append(Lane(pool, rows, Holding("all", window)))
            return
        self.main.append(Lane(pool, rows, Holding("all", chosen=True)))
        self.staging.append(Lane(pool, self._new_row(), Holding("staging", chosen=True), rows))

    def _next_row(self) -> int:
        """Return the row behind those of the layers, their tails and of staging."""
        return len(self._plan.layers) * (2 if self._plan.tails else 1) + len(self.staging) + len(self.fresh)

    def _new_row(self) -> Rows:
        return np.asarray([self._next_row()], dtype=np.int64)

    def _pool(self, fmt: PageFormat, layers: list[int], share: float) -> StripPool:
        # Address space is free on an elastic tier: every pool could hold the whole capacity, with slack for groups
        # that live on with only some of their layers. On a static one each gets its share.
        room = 2 * self.capacity.num_bytes
        if not self._arena.tier.elastic:
            room = int(self.capacity.num_bytes * share)
        return StripPool(self._arena, self._owner, fmt, len(layers), room)

    def __iter__(self) -> Iterator[Lane]:
        """Iterate over the lanes: main ones, tails, staging, fresh ones."""
        return iter(self._lanes)

    def __len__(self) -> int:
        """Return the number of lanes."""
        return len(self._lanes)

    @property
    def open(self) -> list[Lane]:
        """Lanes of strips that take tokens one by one and keep them."""
        return self.tails or self.main

    @property
    def live_bytes(self) -> int:
        """Bytes of pages that hold strips."""
        return sum(pool.live_bytes for pool in self.pools)

    @property
    def free_bytes(self) -> int:
        """Bytes of pages that are resident and hold no strip."""
        return sum(pool.free_bytes for pool in self.pools)

    def shortfall(self, counts: Counts[int], asks: Counts[Counts[Ask]] = ()) -> Shortfall | None:
        """Return why ``counts[i]`` blocks of lane i cannot be had, or None; ``asks`` as for ``take``."""
        asked = list(self._asked(counts))
        for pool, groups, singles in asked:
            needed = pool.groups_of(groups, singles)
            if needed > pool.num_free_groups:
                return Shortfall(needed * pool.group_bytes, pool.num_free_groups * pool.group_bytes)
        available = self._available()
        # A group begins and ends somewhere in a page. Mostly there is room for the worst case: no need to look closer.
        slack = 2 * self._arena.tier.page_bytes
        worst = sum(
            groups * (pool.group_bytes + slack) + singles * (pool.strip_bytes + slack)
            for pool, groups, singles in asked
        )
        if worst <= available:
            return None
        wanted = asks or [()] * len(asked)
        cost = sum(
            pool.cost(groups, singles, each) for (pool, groups, singles), each in zip(asked, wanted, strict=False)
        )
        return Shortfall(cost, max(available, 0)) if cost and cost > available else None

    def _asked(self, counts: Counts[int]) -> Iterator[tuple[StripPool, int, int]]:
        """Yield each pool with the groups and the single strips that ``counts`` ask of it."""
        for number, pool in enumerate(self.pools):
            singles = zip((*self.staging, *self.fresh), counts[len(self.pools) :], strict=True)
            yield pool, counts[number], sum(count for lane, count in singles if lane.pool is pool)

    def take(self, counts: Counts[int], asks: Counts[Counts[Ask]] = ()) -> list[Table]:
        """Take ``counts[i]`` blocks for lane i, or nothing at all.

        ``asks[i]``, where given, says for a lane whose layers lie side by side who wants them, and where.

        Raises:
            OutOfBudget: the pages do not fit.
        """
        taken: list[Table] = []
        try:
            for number, (lane, count) in enumerate(zip(self._lanes, counts, strict=True)):
                if lane.holding.part in ("staging", "fresh"):
                    taken.append(lane.pool.take_singles(count))
                else:
                    taken.append(lane.pool.take(count, asks[number] if asks else ()))
        except BudgetError:
            for lane, entries in zip(self._lanes, taken, strict=False):
                lane.pool.release(entries)
            raise
        return taken

    def take_for(self, what: str, counts: Counts[int], asks: Counts[Counts[Ask]] = ()) -> list[Table]:
        """Take blocks for ``what``, or explain in its words why not.

        Raises:
            OutOfBudget: they do not fit; nothing changes then.
        """
        missing = self.shortfall(counts, asks)
        if missing is not None:
            raise OutOfBudget(
                f"{what} needs {format_bytes(missing.needed_bytes)} of KV memory; "
                f"{format_bytes(missing.available_bytes)} could be had",
                "raise memory= (--memory), or close sequences first",
            )
        return self.take(counts, asks)

    def share(self, table: Table) -> None:
        """Hold all strips of ``table [num_rows, blocks]`` once more."""
        for lane in self._lanes:
            lane.pool.share(table[lane.rows])

    def release(self, table: Table) -> int:
        """Let go of all strips of ``table [num_rows, blocks]``; return the bytes of pages freed."""
        return sum(lane.pool.release(table[lane.rows]) for lane in self._lanes)

    def cut(self, sequence: Sequence, num_tokens: int) -> int:
        """Shorten a sequence to what is held of ``num_tokens`` between steps; return the bytes of pages freed."""
        freed = self.drop_spare(sequence)
        for lane, rows, first, end in self.parts(self.extent(sequence, num_tokens)):
            freed += lane.pool.release(sequence.cut(rows, end))
            if lane.holding.part in ("tail", "staging") and first > sequence.expired_blocks[rows[0]]:
                freed += lane.pool.release(sequence.expire(rows, first))
        sequence.shorten(num_tokens)
        sequence.room = self.room(sequence)
        return freed

    def set_spare(self, sequence: Sequence, lane: Lane, entries: Table, counts: Rows) -> None:
        """Give ``sequence`` spare strips for the users of ``lane``, in place of those it had.

        Args:
            sequence: what it is for.
            lane: one of single strips.
            entries: the strips, those of each user together.
            counts: how many each user gets.
        """
        most = int(counts.max())
        if sequence.spare.shape[1] < most:
            wider = np.full((self.num_rows, most), ABSENT, dtype=np.uint32)
            wider[:, : sequence.spare.shape[1]] = sequence.spare
            sequence.spare = wider
        lane.pool.release(sequence.spare[lane.users])
        sequence.spare[lane.users] = ABSENT
        sequence.spare[np.repeat(lane.users, counts), _within(counts)] = entries

    def drop_spare(self, sequence: Sequence) -> int:
        """Let go of a sequence's spare strips; return the bytes of pages freed."""
        freed = self.release(sequence.spare) if sequence.spare.shape[1] else 0
        sequence.spare = sequence.spare[:, :0]
        return freed

    def room(self, sequence: Sequence) -> int:
        """Return the position from which a sequence needs another strip."""
        if not self.staging:
            return sequence.num_blocks * STRIP_TOKENS
        block = sequence.num_tokens // STRIP_TOKENS
        if not all(sequence.holds(lane.first_row, block) for lane in self.open):
            return sequence.num_tokens
        return (block + 1) * STRIP_TOKENS - len(self.tails[:1])  # the last slot of a block seals it

    def extent(self, sequence: Sequence, num_tokens: int) -> Extent:
        """Return how the first ``num_tokens`` of ``sequence`` are held."""
        dropped = np.zeros(len(self._plan.layers), dtype=np.int64)
        for lane in self.main:
            if lane.holding.chosen:
                dropped[lane.rows] = sequence.expired_blocks[lane.rows]
        open_from = sequence.open_from[: dropped.size]
        return Extent(
            num_tokens,
            tuple(dropped.tolist()) if dropped.any() else (),
            tuple(open_from.tolist()) if open_from.min() < blocks_of(num_tokens) else (),
        )

    def parts(self, extent: Extent) -> Iterator[tuple[Lane, Rows, int, int]]:
        """Yield lane, rows, first and end block of what is held between steps: rows that are alike together."""
        for lane in self._lanes:
            even = extent.is_even or not lane.holding.chosen
            for rows in [lane.rows] if even else np.split(lane.rows, lane.rows.size):
                yield lane, rows, *lane.holding.rest(extent, int(rows[0]) % len(self._plan.layers))

    def pieces(self, start: int, extent: Extent) -> list[tuple[int, StripPool, int, int]]:
        """Return row, pool, first and end block of what a sequence of ``extent`` holds from token ``start`` on."""
        found = []
        for lane, rows, rest, end in self.parts(extent):
            first = max(rest, start // STRIP_TOKENS)
            if first < end:
                found += [(row, lane.pool, first, end) for row in rows.tolist()]
        return sorted(found, key=lambda piece: piece[0])

    def extend(self, sequence: Sequence, start: int, extent: Extent) -> None:
        """Give ``sequence``, of ``start`` tokens, the strips that it would hold if it had grown to ``extent``.

        Raises:
            OutOfBudget: they do not fit; nothing changes then.
        """
        spans = {row: (first, end) for row, _, first, end in self.pieces(start, extent)}

        def size(row: int) -> int:
            first, end = spans.get(row, (0, 0))
            return end - first

        counts = []
        for lane in self._lanes:
            if extent.is_even or not lane.holding.chosen:
                counts.append(size(lane.first_row))
            else:  # layers differ in what they hold: they get single strips
                counts.append(sum(size(row) for row in lane.users.tolist()))
        asks = (
            []
            if not extent.is_even
            else [[lane.ask(sequence, np.arange(*spans.get(lane.first_row, (0, 0))))] for lane in self._lanes]
        )
        taken = self.take_for(f"a span of {extent.num_tokens - start} tokens", counts, asks)
        for lane, entries in zip(self._lanes, taken, strict=True):
            if lane.users.size and not extent.is_even:
                ends = np.cumsum([size(row) for row in lane.users.tolist()])
                for row, part in zip(lane.users.tolist(), np.split(entries[0], ends[:-1]), strict=True):
                    sequence.put(np.asarray([row]), np.arange(*spans.get(row, (0, 0))), part[None])
            elif entries.size:
                sequence.put(lane.rows, np.arange(*spans[lane.first_row]), entries)

    def close(self) -> None:
        """Give all ranges back."""
        for pool in self.pools:
            pool.close()

    def _available(self) -> int:
        """Return the bytes that may be taken on top."""
        room = self.capacity.num_bytes - self.capacity.live_bytes
        free = self._arena.ledger.available(self._arena.tier.name)
        # Free pages of the arena are resident already: they are taken over, or given back before others are charged.
        return room if free is None else min(room, free + self._arena.free_bytes())


def _within(counts: Rows) -> Rows:
    """Return 0 .. count - 1 for each of ``counts``, one behind the other."""
    ends = np.cumsum(counts)
    within: Rows = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    return within
