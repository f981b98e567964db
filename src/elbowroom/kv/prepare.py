"""Preparer: what a step needs before it runs: strips for what it writes, and the tables that attention reads."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kernels.base import PLAIN, Reading, StripStep
from elbowroom.kernels.extras import kept_heads, key_channels, slot_tokens
from elbowroom.kv.base import KVStep, Positions, PromptPart, Shortfall
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.compaction import Compaction
from elbowroom.kv.extents import Ask
from elbowroom.kv.heads import heads_of, whole_places
from elbowroom.kv.holding import NEVER, Blocks, blocks_of
from elbowroom.kv.layout import Lane, PoolSet
from elbowroom.kv.pool import ABSENT
from elbowroom.kv.sequence import Sequence, Table
from elbowroom.kv.tables import TableCache, TailCache, Tails

_NO_BLOCKS: Blocks = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Prepared:
    """What ``attend`` and ``end_step`` need."""

    rows: list[Sequence]
    lengths: npt.NDArray[np.int64]
    steps: dict[int, StripStep]
    """For each layer with keys of its own; layers that begin at the same slots share one."""
    tables: Table
    """``[num_layers, R, blocks]``."""
    tails: Tails | None
    """Where tokens go that are not sealed."""
    compactions: list[Compaction]
    """Rows behind which a policy chooses."""
    waiting: dict[int, npt.NDArray[np.int64]]
    """Rows whose prompt waits, unsealed, for its end -> first open block ``[num_layers]``."""
    selection: Reading | None = None
    """Rows that read a part of their sequence, in layers that let them."""


@dataclass(slots=True)
class _Need:
    """Blocks that one row of a step must get before it runs: for each lane the missing and the shared ones."""

    sequence: Sequence
    missing: list[Blocks]
    copies: list[Blocks]
    compaction: Compaction | None
    """Its fresh strips are taken on top, where a policy chooses."""

    def spare(self, lane: Lane) -> int:
        """Return the single strips that the layers which use staging ``lane`` need for the tokens that stay."""
        return 0 if self.compaction is None else int(self.compaction.num_fresh(lane).sum())


class Preparer:
    """Takes strips for steps and remembers tables from step to step.

    Args:
        pools: where strips come from.
        plan: layers and policy.
    """

    def __init__(self, pools: PoolSet, plan: BoundPlan) -> None:
        self._pools, self._plan = pools, plan
        num_layers = len(plan.layers)
        self._tables = TableCache(num_layers)
        staging = {
            layer: staged.first_row
            for lane, staged in zip(pools.main, pools.staging, strict=False)
            for layer in lane.rows.tolist()
        }
        whole = whole_places(plan.layers) if plan.kept_heads else ()
        self._tails = TailCache(num_layers, staging, whole)

    def clear(self) -> None:
        """Forget the last batch (and with it, sequences that were closed)."""
        self._tables.clear()
        self._tails.clear()

    def prepare(self, step: KVStep, rows: list[Sequence]) -> Prepared | Shortfall:
        """Take all strips that ``step`` writes, copying shared ones; or return what is missing and change nothing.

        Raises:
            IntegrityError: rows or positions are not what the sequences can take; nothing changes then.
        """
        check_rows(step, rows)
        waiting = self._waiting(step, rows)
        lengths, needs = self._needs(step, rows, waiting)
        steps: dict[int, StripStep] = {}
        for lane in self._pools.main:
            steps |= _strip_steps(step, rows, lengths, lane)
        if needs:
            counts = [
                sum(each.missing[number].size + each.copies[number].size + each.spare(lane) for each in needs)
                for number, lane in enumerate(self._pools)
            ]
            asks = [_asks(lane, number, needs) for number, lane in enumerate(self._pools)]
            shortfall = self._pools.shortfall(counts, asks)
            if shortfall is not None:
                return shortfall
            self._provide(needs, self._pools.take(counts, asks))
        tails = None
        if self._pools.tails:
            tails = self._tails.update(rows, step, lengths, waiting)
        compactions = [need.compaction for need in needs if need.compaction is not None]
        tables = self._tables.update(rows)
        staged, selection = self._staged(tables, compactions), self._selection(step, waiting)
        return Prepared(rows, lengths, steps, staged, tails, compactions, waiting, selection)

    def _waiting(self, step: KVStep, rows: Rows[Sequence]) -> dict[int, npt.NDArray[np.int64]]:
        """Return the rows whose full blocks are not sealed in this step, and from which block on."""
        if not self._plan.defers:
            return {}
        count, found = len(self._plan.layers), {}
        for row, sequence in enumerate(rows):
            if sequence.is_open:
                found[row] = sequence.open_from[:count].copy()
            elif part_of(step, row) is not PromptPart.NONE:
                found[row] = np.full(count, NEVER, dtype=np.int64)
                found[row][self._plan.chosen_layers] = sequence.num_tokens // STRIP_TOKENS
        return found

    def _selection(self, step: KVStep, waiting: Collection[int]) -> Reading | None:
        """Return which rows choose what they read: those that decode."""
        reads = self._plan.plan.reads
        if reads is None:
            return None
        decodes = np.diff(step.row_starts) == 1
        if step.prompts is not None:
            decodes &= np.isin(step.prompts, (PromptPart.NONE, PromptPart.CHOICE))
        decodes[list(waiting)] = False
        return reads.reading(decodes.astype(np.uint8)) if decodes.any() else None

    def _staged(self, tables: Table, compactions: Rows[Compaction]) -> Table:
        """Return tables in which the blocks that are staged stand where layers look for them."""
        if not compactions or self._pools.tails:
            return tables
        tables = tables.copy()
        chosen = [lane for lane in self._pools.main if lane.holding.chosen]
        for lane, staging in zip(chosen, self._pools.staging, strict=True):
            for each in compactions:
                waiting = each.sequence.table[staging.first_row]
                blocks = np.flatnonzero(waiting != ABSENT)
                tables[lane.rows[:, None], each.row, blocks[None]] = waiting[blocks]
        return tables

    def _needs(
        self, step: KVStep, rows: Rows[Sequence], waiting: dict[int, npt.NDArray[np.int64]]
    ) -> tuple[npt.NDArray[np.int64], list[_Need]]:
        """Check the positions; return each sequence's length after the step, and who needs blocks."""
        starts, needs = step.row_starts, []
        firsts, lasts = step.positions[starts[:-1]].tolist(), step.positions[starts[1:] - 1].tolist()
        for row, (sequence, first, last) in enumerate(zip(rows, firsts, lasts, strict=True)):
            # A decoding row appends one token, mostly to a block that it has alone.
            if first != last or first != sequence.num_tokens or starts[row + 1] - starts[row] > 1:
                check_positions(sequence, step.positions[starts[row] : starts[row + 1]])
            compaction = self._compaction(step, row, sequence, last + 1, waiting.get(row))
            if compaction is not None or last >= sequence.room or first < sequence.shared_blocks * STRIP_TOKENS:
                waits = row in waiting or not self._pools.tails
                need = self._need(sequence, step.positions[starts[row] : starts[row + 1]], compaction, waits)
                if compaction is not None or any(blocks.size for blocks in (*need.missing, *need.copies)):
                    needs.append(need)
        before = np.asarray([sequence.num_tokens for sequence in rows], dtype=np.int64)
        return np.maximum(before, np.asarray(lasts, dtype=np.int64) + 1), needs

    def _compaction(
        self, step: KVStep, row: int, sequence: Sequence, num_tokens: int, open_from: npt.NDArray[np.int64] | None
    ) -> Compaction | None:
        """Return what a row drops of each layer, and seals at its prompt's end; None: nothing."""
        part = part_of(step, row)
        if part is PromptPart.NONE or not self._pools.staging or not self._plan.chooses:
            return None
        before, ends = sequence.expired_blocks[: len(self._plan.layers)], part.settles
        dropped = self._plan.dropped_blocks(before, num_tokens, ends_prompt=ends)
        seals = open_from is not None and ends and bool((open_from < num_tokens // STRIP_TOKENS).any())
        chooses_heads = ends and bool(self._plan.kept_heads) and not sequence.places
        if not (seals or chooses_heads) and (dropped == before).all():
            return None
        open_after = None
        if open_from is not None:
            open_after = np.full_like(open_from, NEVER) if ends else open_from.copy()
        return Compaction(row, sequence, dropped, num_tokens, ends, open_from, open_after)

    def _need(self, sequence: Sequence, positions: Positions, compaction: Compaction | None, waits: bool) -> _Need:
        blocks = np.unique(positions // STRIP_TOKENS)
        length = max(sequence.num_tokens, int(positions[-1]) + 1)
        need = _Need(sequence, [], [], compaction)
        for lane in self._pools:
            written = self._written(sequence, lane, blocks, length, compaction, waits)
            missing = sequence.missing(lane.first_row, written)
            self._check_channels(sequence, lane, missing)
            need.missing.append(missing)
            need.copies.append(self.shared(sequence, lane, written[~np.isin(written, missing)]))
        return need

    def _check_channels(self, sequence: Sequence, lane: Lane, blocks: Blocks) -> None:
        """Refuse to seal blocks of which no channels or heads were chosen, because no step said that a prompt ends."""
        fmt = lane.pool.fmt
        if not (blocks.size and (fmt.key_channels or fmt.kept_heads) and lane.holding.part == "sealed"):
            return
        first = int(blocks[0])
        unseen = first * STRIP_TOKENS >= sequence.num_tokens
        unseen &= not (first and sequence.holds(lane.first_row, first - 1))
        if (unseen and fmt.key_channels) or (fmt.kept_heads and not sequence.places):
            what = "KV heads" if fmt.kept_heads else "channels"
            raise IntegrityError(
                f"plan {self._plan.plan} chooses {what} where a prompt ends, and {STRIP_TOKENS} tokens are to be "
                "sealed before",
                "mark the rows of a step that read a prompt: KVStep.prompts",
            )

    def _written(
        self,
        sequence: Sequence,
        lane: Lane,
        blocks: Blocks,
        num_tokens: int,
        compaction: Compaction | None,
        waits: bool,
    ) -> Blocks:
        """Return those of ``blocks``, which a step writes, that it writes in ``lane``.

        What a policy will choose from is not sealed before (``waits``). Behind the step, begun blocks are replaced
        where they lie; new ones need not be there in all layers at once.
        """
        part = lane.holding.part
        if not (lane.holding.chosen and waits):
            return lane.holding.written(blocks, sequence.num_tokens, num_tokens)
        if part in ("sealed", "fresh"):
            return _NO_BLOCKS
        if compaction is None:
            return _NO_BLOCKS if part == "staging" else blocks
        begun = blocks < blocks_of(sequence.num_tokens)
        return blocks[~begun if part == "staging" else begun]

    def shared(self, sequence: Sequence, lane: Lane, blocks: Blocks) -> Blocks:
        """Return those of ``blocks``, held in ``lane``, that somebody else holds too."""
        blocks = blocks[blocks < sequence.shared_blocks]
        if not blocks.size:
            return _NO_BLOCKS
        found = [lane.pool.is_shared(sequence.table[lane.rows, block]) for block in blocks]
        shared: Blocks = blocks[np.asarray(found, dtype=bool)]
        return shared

    def _provide(self, needs: Rows[_Need], taken: Rows[Table]) -> None:
        """Hand the columns of ``taken`` to the sequences: for their copies and for their missing blocks."""
        for number, (lane, entries) in enumerate(zip(self._pools, taken, strict=True)):
            offset = 0
            for need in needs:
                missing, copies = need.missing[number], need.copies[number]
                middle = offset + copies.size
                self.replace(need.sequence, lane, copies, entries[:, offset:middle])
                offset = middle + missing.size
                need.sequence.put(lane.rows, missing, entries[:, middle:offset])
                if lane.holding.part == "sealed":
                    self._describe(need.sequence, lane, missing)
                if need.compaction is not None and lane.users.size:
                    counts = need.compaction.num_fresh(lane)
                    self._pools.set_spare(need.sequence, lane, entries[0, offset : offset + counts.sum()], counts)
                    offset += int(counts.sum())
        for need in needs:
            need.sequence.own(np.unique(np.concatenate(need.copies)))
            need.sequence.room = self._pools.room(need.sequence)

    def _describe(self, sequence: Sequence, lane: Lane, blocks: Blocks) -> None:
        """Say in strips that will be sealed as they fill what they will hold.

        Each slot one token; the KV heads that stay; and the channels of the strip before, or, where none is sealed
        yet, those in which the tokens of the open block are largest.
        """
        pool = lane.pool
        for row in lane.rows.tolist() if pool.fmt.key_channels or pool.fmt.counts or pool.fmt.kept_heads else ():
            for block in blocks.tolist():
                strip = pool.strip(int(sequence.table[row, block]))
                if pool.fmt.kept_heads:
                    kept_heads(strip, pool.fmt).numpy()[:] = heads_of(sequence.places[row])
                if pool.fmt.counts:
                    slot_tokens(strip, pool.fmt).fill_(1)
                if not pool.fmt.key_channels:
                    continue
                chosen = key_channels(strip, pool.fmt)
                if block and sequence.holds(row, block - 1):
                    chosen.copy_(key_channels(pool.strip(int(sequence.table[row, block - 1])), pool.fmt))
                else:
                    largest = self._largest_channels(sequence, row, block, pool.fmt.key_channels)
                    chosen.copy_(largest[heads_of(sequence.places[row])] if sequence.places else largest)

    def _largest_channels(self, sequence: Sequence, layer: int, block: int, width: int) -> Tensor:
        """Return the channels, uint8 ``[Hkv, width]``, in which the keys of an open block are largest."""
        tail = next(lane for lane in self._pools.tails if layer + len(self._plan.layers) in lane.rows)
        entry = int(sequence.table[layer + len(self._plan.layers), block])
        keys = PLAIN.open(tail.pool.strip(entry), tail.pool.fmt)[0][:, : sequence.num_tokens % STRIP_TOKENS]
        return keys.float().square().sum(1).topk(width, dim=1).indices.sort(dim=1).values.to(torch.uint8)

    def replace(self, sequence: Sequence, lane: Lane, blocks: Blocks, entries: Table) -> None:
        """Give ``sequence`` copies of its own, ``entries``, in place of the strips of ``blocks``."""
        if blocks.size:
            old = sequence.table[np.ix_(lane.rows, blocks)]
            lane.pool.copy(old, entries)
            sequence.put(lane.rows, blocks, entries)
            lane.pool.release(old)


def _asks(lane: Lane, number: int, needs: Rows[_Need]) -> list[Ask]:
    """Return what ``needs`` ask of a lane, in the order in which they get it."""
    asks = []
    for need in needs:
        asks += [Ask(need.copies[number].size), lane.ask(need.sequence, need.missing[number])]
    return [ask for ask in asks if ask.num_groups]


def part_of(step: KVStep, row: int) -> PromptPart:
    """Return what a row has to do with a prompt."""
    return PromptPart.NONE if step.prompts is None else PromptPart(step.prompts[row])


def _strip_steps(
    step: KVStep, rows: Rows[Sequence], lengths: npt.NDArray[np.int64], lane: Lane
) -> dict[int, StripStep]:
    """Return the step as each layer of ``lane`` sees it: they differ in what has expired."""
    expired = np.zeros((lane.rows.size, len(rows)), dtype=np.int64)
    if lane.holding.window is not None or lane.holding.chosen:
        for row, sequence in enumerate(rows):
            expired[:, row] = sequence.expired_blocks[lane.rows]
    made: dict[bytes, StripStep] = {}
    steps = {}
    for layer, blocks in zip(lane.rows.tolist(), expired, strict=True):
        key = blocks.tobytes()
        if key not in made:
            made[key] = StripStep(
                row_starts=torch.from_numpy(step.row_starts),
                positions=torch.from_numpy(step.positions),
                lengths=torch.from_numpy(lengths),
                first_slots=torch.from_numpy(blocks * STRIP_TOKENS),
            )
        steps[layer] = made[key]
    return steps


class Appending(Protocol):
    """A sequence as positions are checked against it."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are stored."""

    @property
    def writable(self) -> npt.NDArray[np.int64] | None:
        """Stored positions that the next step may write again."""


def check_rows(step: KVStep, rows: Rows[Appending]) -> None:
    """Every row of a step has a sequence of its own, and tokens."""
    if len(set(rows)) != len(rows):
        raise IntegrityError("a sequence occurs in two rows of a step", "put its tokens into one row")
    starts, num_tokens = step.row_starts, step.positions.size
    rising = starts.size == len(rows) + 1 and bool((starts[1:] > starts[:-1]).all())
    if not rising or starts[0] != 0 or starts[-1] != num_tokens:
        raise IntegrityError(f"row_starts {starts.tolist()} do not divide {num_tokens} tokens into {len(rows)} rows")


def check_positions(sequence: Appending, positions: Positions) -> None:
    """Positions must rise and append without a hole; going back needs ``overwrite``."""
    stored = positions[positions < sequence.num_tokens]
    new = positions[stored.size :]
    if (np.diff(positions) < 1).any() or (new != np.arange(new.size) + sequence.num_tokens).any():
        raise IntegrityError(
            f"a step writes positions {positions[0]}..{positions[-1]}, not in order or with a hole behind the "
            f"{sequence.num_tokens} tokens of its sequence"
        )
    if stored.size and (sequence.writable is None or not np.isin(stored, sequence.writable).all()):
        raise IntegrityError(
            f"a step writes position {stored[0]} again, of a sequence of {sequence.num_tokens} tokens",
            "announce all positions that it writes again by overwrite()",
        )
