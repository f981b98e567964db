"""PagedStore: sequences as tables of layer strips in an arena; the default KVStore, for any codec.

Layers with the same format and the same sliding window share a pool, so that what expires together lies together.
Fork shares strips by reference count; a write to a shared strip copies it first (in ``reserve``, so that ``attend``
allocates nothing).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kernels import attention
from elbowroom.kernels.base import TALLY, LayerStrips, Tail
from elbowroom.kv.base import AttnOut, KVHandle, KVReport, KVStep, Positions, Shortfall, Want
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.cascade import check_history, read_history
from elbowroom.kv.checks import check_import, check_open, check_part, check_rollback
from elbowroom.kv.codecs import token_codec
from elbowroom.kv.codecs.ordered import in_order
from elbowroom.kv.compaction import Compactor
from elbowroom.kv.heads import read_places, write_places
from elbowroom.kv.held import read_tokens, report
from elbowroom.kv.holding import NEVER, Blocks, Extent
from elbowroom.kv.layout import Lane, PoolSet
from elbowroom.kv.moving import HeldBlock, check_moving, held_blocks
from elbowroom.kv.prepare import Prepared, Preparer, part_of
from elbowroom.kv.read_count import plane_reads
from elbowroom.kv.sealing import Sealer, open_layer
from elbowroom.kv.sequence import Rows, Sequence
from elbowroom.kv.slots import Slots
from elbowroom.kv.span import pack_span, unpack_span
from elbowroom.kv.statistics import column_statistics
from elbowroom.memory.arena import Arena

OWNER = "kv"


class PagedStore:
    """Stores keys and values in strips of 64 tokens.

    Args:
        plan: the plan, bound to the model.
        arena: where strips live; pages are charged to the owner ``kv`` only while strips use them.
        capacity_bytes: most bytes of pages to hold, or what other stores hold theirs in, too.
        model_id: fingerprint of the model's weights; spans are exchanged only between equal ones.
    """

    def __init__(self, plan: BoundPlan, arena: Arena, capacity_bytes: int | Capacity, model_id: bytes = b"") -> None:
        self.plan = plan
        self.fingerprint = plan.fingerprint() + model_id
        self._arena = arena
        self._codec = plan.plan.layout
        self._open_codec = token_codec(self._codec)
        self._codecs = [in_order(self._codec, plan.orders, layer) for layer in range(len(plan.layers))]
        """For each layer the codec, behind the order of its channels where it has one."""
        capacity = capacity_bytes if isinstance(capacity_bytes, Capacity) else Capacity(capacity_bytes)
        self._pools = PoolSet(plan, arena, OWNER, capacity)
        self._preparer = Preparer(self._pools, plan)
        self._slots = Slots(self._pools, self._codecs)
        policy = plan.policy
        self._compactor = None
        if policy is not None and not plan.defers:
            codecs = [token_codec(each) for each in self._codecs]
            self._compactor = Compactor(policy, codecs, plan.cascade_layers)
        self._sealer = Sealer(plan) if plan.defers else None
        self._last_reader = {source: layer for layer, source in enumerate(self._pools.source_of)}
        """For each layer with keys of its own the last one that reads them."""
        self._tallies = np.zeros((len(plan.layers), len(TALLY)), dtype=np.int64)
        """Of each layer, what rows read that read its keys plane by plane."""
        self._selects = [plan.selects(layer) for layer in range(len(plan.layers))]
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0

    # Sequences

    def open(self, plan: int = 0, expected_tokens: int = 0) -> KVHandle:
        """Return a new empty sequence; room for ``expected_tokens`` is kept side by side while there is other room.

        Raises:
            IntegrityError: ``plan`` is not 0.
        """
        if plan:
            raise IntegrityError(f"the store has one plan, no number {plan}")
        made = Sequence(self._pools.num_rows)
        made.expected_tokens = expected_tokens
        return self._adopt(made)

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        """Return a sequence that shares the first ``num_tokens`` of ``handle``, copy-on-write.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        count = sequence.num_tokens if num_tokens is None else num_tokens
        check_rollback(self._pools, self.plan, sequence, count)
        twin = sequence.prefix(count)
        for lane, rows, first, end in self._pools.parts(self._pools.extent(twin, count)):
            if lane.holding.part == "tail":
                twin.expired_blocks[rows] = first
            blocks = np.arange(twin.expired_blocks[rows[0]], end)
            twin.put(rows, blocks, sequence.table[np.ix_(rows, blocks)])
        twin.room = self._pools.room(twin)
        self._pools.share(twin.table)
        return self._adopt(twin)

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` and return the bytes freed.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        check_rollback(self._pools, self.plan, sequence, num_tokens)
        return self._pools.cut(sequence, num_tokens)

    def close(self, handle: KVHandle) -> int:
        """Forget the sequence and return the bytes freed."""
        sequence = self._sequence(handle)
        del self._sequences[handle.id]
        self._preparer.clear()
        return self._pools.drop_spare(sequence) + self._pools.release(sequence.table)

    def convert(self, handle: KVHandle, plan: int) -> KVHandle:
        """Raise IntegrityError: there is no other plan."""
        raise IntegrityError(f"the store has one plan, no number {plan} for sequence {handle.id}")

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

    # A step

    def reserve(self, step: KVStep) -> Shortfall | None:
        """Take all strips that ``step`` writes, copying shared ones; or return what is missing and change nothing.

        Raises:
            IntegrityError: rows or positions are not what the sequences can take; nothing changes then.
        """
        prepared = self._preparer.prepare(step, [self._sequence(handle) for handle in step.handles])
        if isinstance(prepared, Shortfall):
            return prepared
        step.prepared = prepared
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: KVStep, want: Want) -> AttnOut:
        """Append ``k, v`` of ``layer`` and return attention; needs a successful ``reserve(step)`` before."""
        spec, strips = self.plan.layers[layer], self._strips(layer, step)
        window = self.plan.window
        if spec.kv_source is None and window and self._is_chosen(layer):
            for each in self._prepared(step).compactions:
                rows = slice(int(step.row_starts[each.row]), int(step.row_starts[each.row + 1]))
                each.note(layer, q[rows], window)
        if spec.kv_source is None:
            attention.append(strips, k, v)
        if want.colsum or want.pmax:
            strips = replace(strips, selection=None)  # statistics are of everything
        result = AttnOut(*attention.attend(strips, spec, q))
        if want.colsum or want.pmax:
            column_statistics(result, want, q, spec, strips)
        return result

    def strips(self, layer: int, step: KVStep) -> LayerStrips | None:
        """Return where the layer's strips lie, if no policy wants to see its queries and to choose behind it."""
        if self._prepared(step).compactions and self._is_chosen(layer):
            return None
        return self._strips(layer, step)

    def _is_chosen(self, layer: int) -> bool:
        return self._pools.main[self._pools.number_of[layer]].holding.chosen

    def _strips(self, layer: int, step: KVStep) -> LayerStrips:
        prepared, number = self._prepared(step), self._pools.number_of[layer]
        pool, source = self._pools.main[number].pool, self._pools.source_of[layer]
        table, tails = prepared.tables[source], prepared.tails
        selection = prepared.selection if self._selects[layer] else None
        if tails is None:
            return LayerStrips(
                prepared.steps[source],
                table,
                pool.base,
                pool.fmt,
                self._codecs[source],
                selection=selection,
                tally=self._tallies[layer],
            )
        open_pool = self._pools.tails[number].pool
        tail = Tail(
            table=tails.tables[source],
            first_blocks=tails.first_blocks,
            base=open_pool.base,
            fmt=open_pool.fmt,
            full=tails.full[source],
            sealed=tails.sealed[source],
            open_from=tails.open_in(source),
            places=tails.places[source] if pool.fmt.kept_heads else None,
        )
        return LayerStrips(prepared.steps[source], table, pool.base, pool.fmt, self._codec, tail, selection)

    def end_layer(self, layer: int, step: KVStep) -> None:
        """Let the policy choose among the tokens of rows that read prompts, and free what does not stay."""
        prepared, source = self._prepared(step), self._pools.source_of[layer]
        if not prepared.compactions:
            return
        if not self._is_chosen(source) or self._last_reader[source] != layer:
            return
        number, spec = self._pools.number_of[source], self.plan.layers[source]
        for each in prepared.compactions:
            if self._compactor is not None:
                table = prepared.tables[source, each.row]
                self._compactor.compact(each, source, spec, self._pools.main[number], table)
            elif self._sealer is not None and prepared.tails is not None and each.open_from is not None:
                place = open_layer(each, source, self._pools.main[number], self._pools.tails[number], prepared.tails)
                self._sealer.compact(each, source, spec, place)

    def end_step(self, step: KVStep) -> None:
        """Make the new lengths final and free what sliding windows left behind and what is sealed now.

        The last ``ROLLBACK_TOKENS`` of the step can still be taken back (speculation): no block goes for them yet.
        """
        prepared = self._prepared(step)
        for sequence, length in zip(prepared.rows, prepared.lengths.tolist(), strict=True):
            sequence.step_start = sequence.num_tokens
            sequence.num_tokens = length
            sequence.writable = None
        self._end_prompts(step, prepared)
        for lane in self._pools.dropping:
            for sequence in prepared.rows:
                if lane.holding.part == "tail" and lane.holding.chosen and sequence.is_open:
                    continue  # it waits for the end of its prompt
                first = lane.holding.keeps_from(sequence.step_start, sequence.num_tokens)
                self._expire(sequence, lane, lane.rows, first)
        for sequence in prepared.rows:
            sequence.room = self._pools.room(sequence)
        step.prepared = None

    def _end_prompts(self, step: KVStep, prepared: Prepared) -> None:
        """Note what was chosen, and which blocks go on waiting for the end of a prompt."""
        count = len(self.plan.layers)
        for row, open_from in prepared.waiting.items():
            sequence = prepared.rows[row]
            if not sequence.is_open:
                sequence.open_start = sequence.step_start
            sequence.open_from[:count] = NEVER if part_of(step, row).settles else open_from
        for each in prepared.compactions:
            each.sequence.chosen_tokens = each.num_tokens
            if each.cascade is not None:
                each.sequence.history = each.cascade.finish()
            if each.heads is not None:
                each.sequence.places = each.heads.finish()
            if each.open_after is not None:
                each.sequence.open_from[:count] = each.open_after
            self._pools.drop_spare(each.sequence)

    def _prepared(self, step: KVStep) -> Prepared:
        if not isinstance(step.prepared, Prepared):
            raise IntegrityError("the step was not reserved")
        return step.prepared

    def _expire(self, sequence: Sequence, lane: Lane, rows: Rows, num_blocks: int) -> None:
        """Free the blocks before ``num_blocks`` of some rows of a lane, which are alike."""
        if num_blocks > sequence.expired_blocks[rows[0]]:
            lane.pool.release(sequence.expire(rows, num_blocks))

    def accept(self, handle: KVHandle, kept: Positions) -> None:
        """Keep only ``kept`` (ascending) of the last step's positions; they move to where the step began.

        Raises:
            IntegrityError: ``kept`` is not ascending, not of the last step, or moves to tokens that are sealed (the
                first of a step may be); nothing changes then.
            OutOfBudget: a block that was shared since must be copied and does not fit; nothing changes then.
        """
        sequence = self._sequence(handle)
        start = sequence.step_start
        if kept.size and (kept[0] < start or kept[-1] >= sequence.num_tokens or (np.diff(kept) < 1).any()):
            raise IntegrityError(f"{kept.tolist()} are no ascending positions of {start}..{sequence.num_tokens - 1}")
        count = start + kept.size
        check_rollback(self._pools, self.plan, sequence, count)
        targets = np.arange(start, count)
        moved = targets != kept
        if moved.any():
            check_open(
                self._pools, self.plan, sequence, int(targets[moved][0]) // STRIP_TOKENS, "cannot move accepted tokens"
            )
            self._unshare(sequence, np.unique(targets[moved] // STRIP_TOKENS), count)
            self._slots.move(sequence, kept[moved], targets[moved])
            self._slots.seal(sequence, int(targets[moved][0]) // STRIP_TOKENS, count // STRIP_TOKENS)
        self._pools.cut(sequence, count)

    def _unshare(self, sequence: Sequence, written: Blocks, num_tokens: int) -> None:
        """Copy the shared ones among the blocks ``written``, so that they can be written."""
        copies = []
        for lane in self._pools:
            blocks = written if lane.holding.part != "sealed" else written[written < num_tokens // STRIP_TOKENS]
            absent = sequence.missing(lane.first_row, blocks)
            copies.append(self._preparer.shared(sequence, lane, blocks[~np.isin(blocks, absent)]))
        taken = self._pools.take_for("a copy of shared tokens", [blocks.size for blocks in copies])
        for lane, blocks, entries in zip(self._pools, copies, taken, strict=True):
            self._preparer.replace(sequence, lane, blocks, entries)
        sequence.own(written)

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
            check_rollback(self._pools, self.plan, sequence, int(wanted[0]))
            for block in np.unique(wanted // STRIP_TOKENS).tolist():
                check_open(self._pools, self.plan, sequence, block, f"cannot write block {block} again")
        sequence.writable = wanted

    # Moving

    def read(self, handle: KVHandle, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys ``[n, Hkv, Dk]`` and values ``[n, Hkv, Dv]`` of tokens ``start .. stop - 1``, decoded.

        ``start`` is a multiple of 64. What a sliding window has dropped is 0.
        """
        sequence = self._sequence(handle)
        return read_tokens(self._pools, sequence, layer, (start, stop), self._codecs[layer])

    def write(self, layer: int, k: Tensor, v: Tensor, step: KVStep) -> None:
        """Append ``k, v`` of ``layer`` as ``attend`` does, without attention."""
        attention.append(self._strips(layer, step), k, v)

    def forget(self, handle: KVHandle, num_blocks: int) -> None:
        """Free the first blocks of a sequence that will be closed next; nothing else can be done with it."""
        sequence = self._sequence(handle)
        for lane in self._pools.main:
            self._expire(sequence, lane, lane.rows, num_blocks)

    def lend(self, handle: KVHandle, num_tokens: int) -> list[HeldBlock]:
        """Return where the bytes of the first ``num_tokens`` lie; they are those until the sequence changes.

        Raises:
            IntegrityError: the sequence is shorter, or a strip of them has expired.
            PlanError: the plan chooses among tokens, heads or channels.
        """
        check_moving(self.plan.plan)
        sequence = self._sequence(handle)
        check_rollback(self._pools, self.plan, sequence, num_tokens)
        return held_blocks(self._pools, sequence, num_tokens)

    def admit(self, num_tokens: int, plan: int = 0) -> KVHandle:
        """Return a new sequence of ``num_tokens``; its bytes are to be written where ``lend`` says.

        Raises:
            OutOfBudget: the strips do not fit; nothing changes then.
        """
        handle = self.open(plan)
        try:
            self._extend(self._sequence(handle), 0, Extent(num_tokens))
        except BaseException:
            self.close(handle)
            raise
        return handle

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
        check_rollback(self._pools, self.plan, sequence, stop)
        extent = self._pools.extent(sequence, stop)
        if start and (self.plan.kept_heads or not extent.is_even):
            raise IntegrityError(
                f"plan {self.plan.plan} has dropped tokens: what is left has no part that begins at {start}",
                "start at 0",
            )
        strips: list[npt.NDArray[np.uint8]] = []
        for row, pool, first, end in self._pools.pieces(start, extent):
            held = [pool.strip(entry) for entry in sequence.table[row, first:end].tolist()]
            if stop < end * STRIP_TOKENS:
                held[-1] = self._slots.blanked(held[-1], pool, row, stop % STRIP_TOKENS)
            strips.extend(strip.numpy() for strip in held)
        noted = write_places(sequence.places) if sequence.history is None else sequence.history.to_bytes()
        return pack_span(self.fingerprint, start, extent, strips, noted)

    def import_span(self, handle: KVHandle, span: bytes) -> int:
        """Append an exported span; return the tokens added.

        Raises:
            IntegrityError: damaged bytes, another model or plan, or a span that does not start where the sequence ends.
            OutOfBudget: the strips do not fit. In either case nothing changes.
        """
        start, extent, noted, payload = unpack_span(span, self.fingerprint, len(self.plan.layers))
        sequence = self._sequence(handle)
        if start != sequence.num_tokens or start % STRIP_TOKENS:
            raise IntegrityError(f"the span starts at token {start}, the sequence ends at {sequence.num_tokens}")
        pieces, count = self._pools.pieces(start, extent), extent.num_tokens - start
        if sum((end - first) * pool.strip_bytes for _, pool, first, end in pieces) != len(payload):
            raise IntegrityError(f"the KV span has {len(payload)} bytes of strips, not those of {count} tokens")
        kept = self.plan.kept_heads
        history = read_history(b"" if kept else noted, extent, self.plan.cascade_layers)
        places = read_places(noted, start, self.plan.layers, kept) if kept else ()
        check_import(self.plan, extent, pieces, payload, places)
        self._extend(sequence, start, extent)
        sequence.history, sequence.places = history, places
        if places:
            sequence.chosen_tokens = extent.num_tokens
        offset = 0
        for row, pool, first, end in pieces:
            for entry in sequence.table[row, first:end].tolist():
                chunk = np.frombuffer(payload, dtype=np.uint8, count=pool.strip_bytes, offset=offset)
                pool.strip(entry).numpy()[:] = chunk
                offset += pool.strip_bytes
        return count

    def _extend(self, sequence: Sequence, start: int, extent: Extent) -> None:
        """Lengthen ``sequence`` from ``start`` to ``extent``, with the strips that it would hold then."""
        self._pools.cut(sequence, start)  # blocks of a step that was reserved and never run
        self._pools.extend(sequence, start, extent)
        sequence.num_tokens = sequence.step_start = extent.num_tokens
        if not extent.is_even:
            sequence.chosen_tokens = extent.num_tokens
        if extent.open_from:
            sequence.open_from[: len(extent.open_from)] = extent.open_from
        for lane, rows, first, _ in self._pools.parts(extent):
            self._expire(sequence, lane, rows, first)
        sequence.room = self._pools.room(sequence)

    # Bytes

    def resize(self, capacity_bytes: int) -> int:
        """Set the most bytes to hold; return how many are held above that."""
        capacity = self._pools.capacity
        capacity.num_bytes = capacity_bytes
        return max(capacity.live_bytes - capacity_bytes, 0)

    def report(self) -> KVReport:
        """Return what is held."""
        reads = plane_reads(self._tallies, self.plan.formats)
        return report(self._pools, self.plan, list(self._sequences.values()), reads)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless reference counts, free stacks and pages agree with the tables."""
        for pool in self._pools.pools:
            rows = np.concatenate([lane.rows for lane in self._pools if lane.pool is pool])
            entries = [sequence.table[rows].reshape(-1) for sequence in self._sequences.values()]
            entries += [sequence.spare[rows].reshape(-1) for sequence in self._sequences.values()]
            pool.check(np.concatenate([np.empty(0, dtype=np.uint32), *entries]))
        for sequence in self._sequences.values():
            extent = self._pools.extent(sequence, sequence.num_tokens)
            for part in self._pools.parts(extent):
                check_part(sequence, *part)
            check_history(sequence.history, extent, self.plan.cascade_layers)
        if self._arena.ledger.held(OWNER, self._arena.tier.name) < self._pools.live_bytes:
            raise IntegrityError("the ledger charges fewer bytes than the pages that hold strips")

    def close_all(self) -> None:
        """Close every sequence and give all pages back."""
        for handle_id in list(self._sequences):
            self.close(KVHandle(handle_id))
        self._pools.close()
