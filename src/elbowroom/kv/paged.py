"""PagedStore: sequences as tables of layer strips in an arena; the default KVStore, for any codec.

Layers with the same format and the same sliding window share a pool, so that what expires together lies together.
Fork shares strips by reference count; a write to a shared strip copies it first (in ``reserve``, so that ``attend``
allocates nothing).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kernels import attention
from elbowroom.kernels.base import LayerStrips, StripStep
from elbowroom.kv.base import AttnOut, KVHandle, KVReport, KVStep, Positions, Shortfall, Want
from elbowroom.kv.layout import PoolSet
from elbowroom.kv.plan import ROLLBACK_TOKENS, BoundPlan
from elbowroom.kv.pool import ABSENT, StripPool
from elbowroom.kv.sequence import Sequence, Table, blocks_of
from elbowroom.kv.span import pack_span, unpack_span
from elbowroom.kv.statistics import column_statistics
from elbowroom.kv.tables import TableCache
from elbowroom.memory.arena import Arena

OWNER = "kv"

Blocks = npt.NDArray[np.int64]
_NO_BLOCKS: Blocks = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class _Prepared:
    """What ``attend`` and ``end_step`` need, computed once in ``reserve``."""

    rows: list[Sequence]
    lengths: npt.NDArray[np.int64]
    steps: list[StripStep]
    """One for each pool."""
    tables: Table
    """``[num_layers, R, blocks]``."""


@dataclass(slots=True)
class _Need:
    """Blocks one row of a step must get before it runs."""

    sequence: Sequence
    new_blocks: int
    copies: Blocks
    """Shared blocks that will be written."""


class PagedStore:
    """Stores keys and values in strips of 64 tokens.

    Args:
        plan: the plan, bound to the model.
        arena: where strips live; pages are charged to the owner ``kv`` only while strips use them.
        capacity_bytes: most bytes of pages to hold.
        model_id: fingerprint of the model's weights; spans are exchanged only between equal ones.
    """

    def __init__(self, plan: BoundPlan, arena: Arena, capacity_bytes: int, model_id: bytes = b"") -> None:
        self.plan = plan
        self.fingerprint = plan.fingerprint() + model_id
        self._arena = arena
        self._codec = plan.plan.codec
        self._pools = PoolSet(plan, arena, OWNER, capacity_bytes)
        self._tables = TableCache(len(plan.layers))
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0

    # Sequences

    def open(self) -> KVHandle:
        """Return a new empty sequence."""
        return self._adopt(Sequence(len(self.plan.layers)))

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        """Return a sequence that shares the first ``num_tokens`` of ``handle``, copy-on-write.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        count = sequence.num_tokens if num_tokens is None else num_tokens
        self._check_rollback(sequence, count)
        twin = sequence.copy_prefix(count)
        self._pools.share(twin.table)
        return self._adopt(twin)

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` and return the bytes freed.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        self._check_rollback(sequence, num_tokens)
        return self._pools.release(sequence.cut(num_tokens))

    def close(self, handle: KVHandle) -> int:
        """Forget the sequence and return the bytes freed."""
        sequence = self._sequence(handle)
        del self._sequences[handle.id]
        self._tables.clear()
        return self._pools.release(sequence.table)

    def num_tokens(self, handle: KVHandle) -> int:
        """Return how many tokens the sequence holds."""
        return self._sequence(handle).num_tokens

    def _adopt(self, sequence: Sequence) -> KVHandle:
        handle = KVHandle(self._next_id)
        self._next_id += 1
        self._sequences[handle.id] = sequence
        return handle

    def _sequence(self, handle: KVHandle) -> Sequence:
        sequence = self._sequences.get(handle.id)
        if sequence is None:
            raise IntegrityError(f"sequence {handle.id} is not open in this store")
        return sequence

    def _check_rollback(self, sequence: Sequence, num_tokens: int) -> None:
        if not 0 <= num_tokens <= sequence.num_tokens:
            raise IntegrityError(f"a sequence of {sequence.num_tokens} tokens has no prefix of {num_tokens}")
        for pool in self._pools.windowed:
            lost = int(sequence.expired_blocks[pool.first_layer])
            if lost > pool.expired_blocks(num_tokens):
                raise IntegrityError(
                    f"cannot go back to token {num_tokens}: tokens before {lost * STRIP_TOKENS} left the sliding "
                    f"window of {pool.window}",
                    "prefill the prefix again",
                )

    # A step

    def reserve(self, step: KVStep) -> Shortfall | None:
        """Take all strips that ``step`` writes, copying shared ones; or return what is missing and change nothing.

        Raises:
            IntegrityError: rows or positions are not what the sequences can take; nothing changes then.
        """
        rows = [self._sequence(handle) for handle in step.handles]
        _check_rows(step, rows)
        lengths, needs = self._needs(step, rows)
        steps = [self._strip_step(step, rows, lengths, pool) for pool in self._pools]
        if needs:
            num_blocks = sum(need.new_blocks + len(need.copies) for need in needs)
            shortfall = self._pools.shortfall([num_blocks] * len(self._pools))
            if shortfall is not None:
                return shortfall
            self._provide(needs, self._pools.take([num_blocks] * len(self._pools)))
        step.prepared = _Prepared(rows, lengths, steps, self._tables.update(rows))
        return None

    def _needs(self, step: KVStep, rows: Rows[Sequence]) -> tuple[npt.NDArray[np.int64], list[_Need]]:
        """Check the positions; return each sequence's length after the step, and who needs blocks."""
        starts, needs = step.row_starts, []
        firsts, lasts = step.positions[starts[:-1]].tolist(), step.positions[starts[1:] - 1].tolist()
        for row, (sequence, first, last) in enumerate(zip(rows, firsts, lasts, strict=True)):
            # A decoding row appends one token, mostly to a block that it has alone.
            if first != last or first != sequence.num_tokens or starts[row + 1] - starts[row] > 1:
                _check_positions(sequence, step.positions[starts[row] : starts[row + 1]])
            if last >= sequence.num_blocks * STRIP_TOKENS or first < sequence.shared_blocks * STRIP_TOKENS:
                copies = _NO_BLOCKS
                if first < sequence.shared_blocks * STRIP_TOKENS:
                    copies = self._shared_blocks(sequence, step.positions[starts[row] : starts[row + 1]])
                new_blocks = max(last // STRIP_TOKENS + 1 - sequence.num_blocks, 0)
                if new_blocks > 0 or copies.size:
                    needs.append(_Need(sequence, new_blocks, copies))
        before = np.asarray([sequence.num_tokens for sequence in rows], dtype=np.int64)
        return np.maximum(before, np.asarray(lasts, dtype=np.int64) + 1), needs

    def _shared_blocks(self, sequence: Sequence, positions: Positions) -> Blocks:
        """Return the blocks under ``positions`` that somebody else holds too."""
        blocks = np.unique(positions // STRIP_TOKENS)
        blocks = blocks[blocks < sequence.shared_blocks]
        shared = [any(pool.is_shared(sequence.table[pool.layers, block]) for pool in self._pools) for block in blocks]
        found: Blocks = blocks[np.asarray(shared, dtype=bool)]
        return found

    def _strip_step(
        self, step: KVStep, rows: Rows[Sequence], lengths: npt.NDArray[np.int64], pool: StripPool
    ) -> StripStep:
        first_slots = np.zeros(len(rows), dtype=np.int64)
        if pool.window is not None:
            first_slots[:] = [sequence.expired_blocks[pool.first_layer] * STRIP_TOKENS for sequence in rows]
        return StripStep(
            row_starts=torch.from_numpy(step.row_starts),
            positions=torch.from_numpy(step.positions),
            lengths=torch.from_numpy(lengths),
            first_slots=torch.from_numpy(first_slots),
        )

    def _provide(self, needs: Rows[_Need], taken: Rows[Table]) -> None:
        """Hand the columns of ``taken`` to the sequences: first for their copies, then for their new blocks."""
        offset = 0
        for need in needs:
            sequence, middle = need.sequence, offset + len(need.copies)
            stop = middle + need.new_blocks
            new = np.arange(sequence.num_blocks, sequence.num_blocks + need.new_blocks)
            sequence.append(need.new_blocks)
            for pool, entries in zip(self._pools, taken, strict=True):
                self._replace(sequence, pool, need.copies, entries[:, offset:middle])
                sequence.put(pool.layers, new, entries[:, middle:stop])
            sequence.own(need.copies)
            offset = stop

    def _replace(self, sequence: Sequence, pool: StripPool, blocks: Blocks, entries: Table) -> None:
        """Give ``sequence`` copies of its own, ``entries``, in place of the strips of ``blocks``."""
        if blocks.size:
            old = sequence.table[np.ix_(pool.layers, blocks)]
            pool.copy(old, entries)
            sequence.put(pool.layers, blocks, entries)
            pool.release(old)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: KVStep, want: Want) -> AttnOut:
        """Append ``k, v`` of ``layer`` and return attention; needs a successful ``reserve(step)`` before."""
        prepared = self._prepared(step)
        spec, pool = self.plan.layers[layer], self._pools.of_layer(layer)
        strip_step = prepared.steps[self._pools.number_of[layer]]
        table = prepared.tables[self._pools.source_of[layer]]
        if spec.kv_source is None:
            attention.append(strip_step, table, pool.base, pool.fmt, k, v, layout=self._codec)
        out, lse = attention.attend(strip_step, table, pool.base, pool.fmt, spec, q, layout=self._codec)
        result = AttnOut(out, lse)
        if want.colsum or want.pmax:
            column_statistics(result, want, q, spec, strip_step, self._open_row(pool, table))
        return result

    def strips(self, layer: int, step: KVStep) -> LayerStrips | None:
        """Return where the layer's strips lie if tokens can be written to them one by one."""
        if self._codec.coupling != "token":
            return None
        prepared, pool = self._prepared(step), self._pools.of_layer(layer)
        table = prepared.tables[self._pools.source_of[layer]]
        return LayerStrips(prepared.steps[self._pools.number_of[layer]], table, pool.base, pool.fmt)

    def _open_row(self, pool: StripPool, table: Table) -> list[list[tuple[Tensor, Tensor] | None]]:
        """Return, for each row of the step, its decoded strips (None where expired)."""
        return [
            [None if entry == ABSENT else self._codec.open(pool.strip(int(entry)), pool.fmt) for entry in row]
            for row in table
        ]

    def end_layer(self, layer: int, step: KVStep) -> None:
        """Nothing to compact: a plain plan keeps every token."""

    def end_step(self, step: KVStep) -> None:
        """Make the new lengths final and free the strips that sliding windows left behind.

        The last ``ROLLBACK_TOKENS`` of the step can still be taken back (speculation), so they move no window yet.
        """
        prepared = self._prepared(step)
        for sequence, length in zip(prepared.rows, prepared.lengths.tolist(), strict=True):
            sequence.step_start = sequence.num_tokens
            sequence.num_tokens = length
            sequence.writable = None
        if self._pools.windowed:
            for sequence in prepared.rows:
                self._expire(sequence, max(sequence.step_start, sequence.num_tokens - ROLLBACK_TOKENS))
        step.prepared = None

    def _prepared(self, step: KVStep) -> _Prepared:
        if not isinstance(step.prepared, _Prepared):
            raise IntegrityError("the step was not reserved")
        return step.prepared

    def _expire(self, sequence: Sequence, num_tokens: int) -> None:
        """Free what no token from position ``num_tokens`` on reads."""
        for pool in self._pools.windowed:
            blocks = pool.expired_blocks(num_tokens)
            if blocks > sequence.expired_blocks[pool.first_layer]:
                pool.release(sequence.expire(pool.layers, blocks))

    def accept(self, handle: KVHandle, kept: Positions) -> None:
        """Keep only ``kept`` (ascending) of the last step's positions; they move to where the step began.

        Raises:
            IntegrityError: ``kept`` is not ascending, or not of the last step; nothing changes then.
            OutOfBudget: a block that was shared since must be copied and does not fit; nothing changes then.
        """
        sequence = self._sequence(handle)
        start = sequence.step_start
        if kept.size and (kept[0] < start or kept[-1] >= sequence.num_tokens or (np.diff(kept) < 1).any()):
            raise IntegrityError(f"{kept.tolist()} are no ascending positions of {start}..{sequence.num_tokens - 1}")
        count = start + kept.size
        self._check_rollback(sequence, count)
        targets = np.arange(start, count)
        moved = targets != kept
        if moved.any():
            self._unshare(sequence, self._shared_blocks(sequence, targets[moved]))
            self._move(sequence, kept[moved], targets[moved])
        self._pools.release(sequence.cut(count))

    def _unshare(self, sequence: Sequence, blocks: Blocks) -> None:
        """Copy shared ``blocks``, so that they can be written."""
        held = [blocks[sequence.table[pool.first_layer, blocks] != ABSENT] for pool in self._pools]
        taken = self._pools.take_for("a copy of shared tokens", [len(each) for each in held])
        for pool, each, entries in zip(self._pools, held, taken, strict=True):
            self._replace(sequence, pool, each, entries)
        sequence.own(blocks)

    def _move(self, sequence: Sequence, sources: Positions, targets: Positions) -> None:
        """Copy tokens to lower slots, one run of equal (source block, target block) at a time."""
        pairs = sources // STRIP_TOKENS * sequence.num_blocks + targets // STRIP_TOKENS
        for run in np.split(np.arange(pairs.size), np.flatnonzero(np.diff(pairs)) + 1):
            blocks = int(sources[run[0]]) // STRIP_TOKENS, int(targets[run[0]]) // STRIP_TOKENS
            read_slots, write_slots = sources[run] % STRIP_TOKENS, targets[run] % STRIP_TOKENS
            for pool in self._pools:
                for layer in pool.layers.tolist():
                    source, target = (int(sequence.table[layer, block]) for block in blocks)
                    if target == ABSENT:  # the window has passed: nobody will read it
                        continue
                    read, write = (self._codec.fields(pool.strip(entry), pool.fmt) for entry in (source, target))
                    for old, new in zip(read, write, strict=True):
                        new[:, write_slots] = old[:, read_slots]

    def overwrite(self, handle: KVHandle, positions: Positions) -> None:
        """Allow the next step to write ``positions`` again.

        Raises:
            IntegrityError: a position is not stored, or a sliding window has dropped what it reads.
        """
        sequence = self._sequence(handle)
        wanted = np.unique(np.asarray(positions, dtype=np.int64))
        if wanted.size and not 0 <= wanted[0] <= wanted[-1] < sequence.num_tokens:
            raise IntegrityError(
                f"positions {wanted[0]}..{wanted[-1]} are not all stored in a sequence of {sequence.num_tokens} tokens"
            )
        if wanted.size:
            self._check_rollback(sequence, int(wanted[0]))
        sequence.writable = wanted

    # Moving

    def export_span(self, handle: KVHandle, start: int, stop: int) -> bytes:
        """Return tokens ``[start, stop)`` as one checksummed object.

        Of a layer with a sliding window it holds what a query at ``stop`` or later could read.

        Raises:
            IntegrityError: ``start`` is not a multiple of 64, or a strip of the span has expired.
        """
        sequence = self._sequence(handle)
        if start % STRIP_TOKENS or not 0 <= start < stop <= sequence.num_tokens:
            raise IntegrityError(
                f"tokens {start}..{stop} are no span of a sequence of {sequence.num_tokens}",
                f"start at a multiple of {STRIP_TOKENS}",
            )
        self._check_rollback(sequence, stop)
        strips: list[npt.NDArray[np.uint8]] = []
        for layer, pool, first, end in self._pools.pieces(start, stop):
            held = [pool.strip(entry) for entry in sequence.table[layer, first:end].tolist()]
            if stop % STRIP_TOKENS and held:
                held[-1] = self._blanked(held[-1], pool, stop % STRIP_TOKENS)
            strips.extend(strip.numpy() for strip in held)
        return pack_span(self.fingerprint, start, stop, strips)

    def _blanked(self, strip: Tensor, pool: StripPool, used: int) -> Tensor:
        """Return a copy without the slots from ``used`` on: they may hold what another sequence left there."""
        copy = strip.clone()
        for part in self._codec.fields(copy, pool.fmt):
            part[:, used:] = 0
        return copy

    def import_span(self, handle: KVHandle, span: bytes) -> int:
        """Append an exported span; return the tokens added.

        Raises:
            IntegrityError: damaged bytes, another model or plan, or a span that does not start where the sequence ends.
            OutOfBudget: the strips do not fit. In either case nothing changes.
        """
        start, stop, payload = unpack_span(span, self.fingerprint)
        sequence = self._sequence(handle)
        if start != sequence.num_tokens or start % STRIP_TOKENS:
            raise IntegrityError(f"the span starts at token {start}, the sequence ends at {sequence.num_tokens}")
        pieces = self._pools.pieces(start, stop)
        if sum((end - first) * pool.strip_bytes for _, pool, first, end in pieces) != len(payload):
            raise IntegrityError(f"the KV span has {len(payload)} bytes of strips, not those of {stop - start} tokens")
        self._extend(sequence, start, stop)
        offset = 0
        for layer, pool, first, end in pieces:
            for entry in sequence.table[layer, first:end].tolist():
                chunk = np.frombuffer(payload, dtype=np.uint8, count=pool.strip_bytes, offset=offset)
                pool.strip(entry).numpy()[:] = chunk
                offset += pool.strip_bytes
        return stop - start

    def _extend(self, sequence: Sequence, start: int, stop: int) -> None:
        """Lengthen ``sequence`` from ``start`` to ``stop``, with the strips that it would hold then."""
        self._pools.release(sequence.cut(start))  # blocks of a step that was reserved and never run
        end = blocks_of(stop)
        counts = [end - max(start // STRIP_TOKENS, pool.expired_blocks(stop)) for pool in self._pools]
        taken = self._pools.take_for(f"a span of {stop - start} tokens", counts)
        sequence.append(end - sequence.num_blocks)
        for pool, count, entries in zip(self._pools, counts, taken, strict=True):
            sequence.put(pool.layers, np.arange(end - count, end), entries)
        sequence.num_tokens = sequence.step_start = stop
        self._expire(sequence, stop)

    # Bytes

    def resize(self, capacity_bytes: int) -> int:
        """Set the most bytes to hold; return how many are held above that."""
        self._pools.capacity_bytes = capacity_bytes
        return max(self._pools.live_bytes - capacity_bytes, 0)

    def report(self) -> KVReport:
        """Return what is held."""
        tokens = sum(sequence.num_tokens for sequence in self._sequences.values())
        width = sum(
            layer.num_kv_heads * (layer.head_dim + layer.v_head_dim)
            for layer in self.plan.layers
            if layer.kv_source is None
        )
        return KVReport(
            live_bytes=self._pools.live_bytes,
            free_bytes=self._pools.free_bytes,
            capacity_bytes=self._pools.capacity_bytes,
            num_sequences=len(self._sequences),
            num_tokens=tokens,
            num_strips=sum(pool.num_strips for pool in self._pools),
            num_shared_strips=sum(pool.num_shared_strips for pool in self._pools),
            bf16_bytes=tokens * width * 2,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless reference counts, free stacks and pages agree with the tables."""
        for pool in self._pools:
            entries = [sequence.table[pool.layers].reshape(-1) for sequence in self._sequences.values()]
            pool.check(np.concatenate([np.empty(0, dtype=np.uint32), *entries]))
            for sequence in self._sequences.values():
                absent = sequence.table[pool.layers] == ABSENT
                expired = np.arange(sequence.num_blocks) < sequence.expired_blocks[pool.layers][:, None]
                if not np.array_equal(absent, expired) or sequence.num_blocks < blocks_of(sequence.num_tokens):
                    raise IntegrityError("a table lacks strips that did not expire")
        if self._arena.ledger.held(OWNER, self._arena.tier.name) < self._pools.live_bytes:
            raise IntegrityError("the ledger charges fewer bytes than the pages that hold strips")

    def close_all(self) -> None:
        """Close every sequence and give all pages back."""
        for handle_id in list(self._sequences):
            self.close(KVHandle(handle_id))
        self._pools.close()


def _check_rows(step: KVStep, rows: Rows[Sequence]) -> None:
    """Every row of a step has a sequence of its own, and tokens."""
    if len(set(rows)) != len(rows):
        raise IntegrityError("a sequence occurs in two rows of a step", "put its tokens into one row")
    starts, num_tokens = step.row_starts, step.positions.size
    rising = starts.size == len(rows) + 1 and bool((starts[1:] > starts[:-1]).all())
    if not rising or starts[0] != 0 or starts[-1] != num_tokens:
        raise IntegrityError(f"row_starts {starts.tolist()} do not divide {num_tokens} tokens into {len(rows)} rows")


def _check_positions(sequence: Sequence, positions: Positions) -> None:
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
