"""ContiguousStore: each sequence is one plain tensor a layer, in address space whose pages are committed as it grows.

The second KVStore, for plain codecs (vAttention, arXiv 2405.04437). Tokens lie one behind the other
(``kernels/token_major.py``), so that attention which knows nothing of strips reads ``tensors`` as they are; our own
kernels are given tables whose entries follow one another. What the last page of a layer has left is all that is wasted.
Sequences share nothing: a fork is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import ConfigError, IntegrityError
from elbowroom.kernels import attention
from elbowroom.kernels.base import PLAIN, UNIT_BYTES, LayerStrips, StripStep, StripTable
from elbowroom.kernels.token_major import BY_TOKEN
from elbowroom.kv.base import AttnOut, KVHandle, KVReport, KVStep, Positions, Shortfall, Want
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.capabilities import check_contiguous
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.holding import Blocks, Extent, Holding, blocks_of
from elbowroom.kv.moving import HeldBlock
from elbowroom.kv.prepare import check_positions, check_rows
from elbowroom.kv.row_space import Growth, RowSequence, RowSpace
from elbowroom.kv.span import pack_span, unpack_span
from elbowroom.kv.statistics import column_statistics
from elbowroom.memory.arena import Arena

OWNER = "kv"
_SPARE_BLOCKS = 4
"""Room for growth in tables of a batch."""


@dataclass(slots=True)
class _Prepared:
    """What ``attend`` and ``end_step`` need."""

    rows: list[RowSequence]
    lengths: npt.NDArray[np.int64]
    steps: list[StripStep]
    """For each layer with keys of its own; those with the same sliding window share one."""
    tables: dict[int, StripTable]
    """By the bytes of a strip."""


class ContiguousStore:
    """Stores keys and values of a sequence in one piece of address space a layer.

    Args:
        plan: the plan, bound to the model; plain.
        arena: where rows lie; pages are charged to the owner ``kv`` only while tokens use them.
        capacity_bytes: most bytes of pages to hold.
        model_id: fingerprint of the model's weights; spans are exchanged only between equal ones.
        num_rows: most sequences with tokens at a time; each takes address space for ``row_tokens``.
        row_tokens: most tokens of a sequence.
        static: commit whole rows at once and for good, as many as the capacity holds: what the others are compared to.

    Raises:
        ConfigError: the arena's tier cannot give back single pages.
        PlanError: the plan is not plain.
    """

    def __init__(
        self,
        plan: BoundPlan,
        arena: Arena,
        capacity_bytes: int | Capacity,
        model_id: bytes = b"",
        *,
        num_rows: int = 128,
        row_tokens: int = 8192,
        static: bool = False,
    ) -> None:
        check_contiguous(plan)
        if not arena.tier.elastic:
            raise ConfigError(
                f"the contiguous KV store cannot commit single pages of memory tier {arena.tier.name!r}",
                "keep the KV cache in host memory, or use the paged store (--kv-store paged)",
            )
        self.plan = plan
        self.fingerprint = plan.fingerprint() + model_id
        self._arena = arena
        capacity = capacity_bytes if isinstance(capacity_bytes, Capacity) else Capacity(capacity_bytes)
        self._space = RowSpace(plan, arena, OWNER, capacity, num_rows, row_tokens, static)
        owners = self._space.owners
        sources = [index if each.kv_source is None else each.kv_source for index, each in enumerate(plan.layers)]
        self._place_of = [owners.index(source) for source in sources]
        """For each layer the place, among those with keys of their own, of what it reads."""
        self._holdings = [Holding("all", plan.layers[layer].window) for layer in owners]
        self._windowed = [place for place, holding in enumerate(self._holdings) if holding.window is not None]
        self._bases = [self._space.base(place) for place in range(len(owners))]
        self._batch: tuple[list[int], dict[int, StripTable]] = [], {}
        """Rows and tables of the last step."""
        self._sequences: dict[int, RowSequence] = {}
        self._next_id = 0

    # Sequences

    def open(self, plan: int = 0, expected_tokens: int = 0) -> KVHandle:
        """Return a new empty sequence; it gets a row, which has room for all tokens, with its first token.

        Raises:
            IntegrityError: ``plan`` is not 0.
        """
        if plan:
            raise IntegrityError(f"the store has one plan, no number {plan}")
        return self._adopt(self._space.new_sequence())

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        """Return a sequence with a copy of the first ``num_tokens`` of ``handle``: its bytes are taken at once.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
            OutOfBudget: the copy does not fit; nothing changes then.
        """
        sequence = self._sequence(handle)
        count = sequence.num_tokens if num_tokens is None else num_tokens
        self._check_rollback(sequence, count)
        twin = self._space.new_sequence()
        twin.expired_blocks = np.minimum(sequence.expired_blocks, blocks_of(count))
        if count:
            first = self._space.first_pages(twin.expired_blocks)
            self._space.grow_for(f"a copy of {count} tokens", Growth(twin, count, first))
            for place, gone in enumerate(twin.expired_blocks.tolist()):
                part = place, gone * STRIP_TOKENS, count
                self._space.bytes_of(twin, *part).copy_(self._space.bytes_of(sequence, *part))
        twin.num_tokens = twin.step_start = count
        return self._adopt(twin)

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` and return the bytes freed.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        self._check_rollback(sequence, num_tokens)
        return self._cut(sequence, num_tokens)

    def close(self, handle: KVHandle) -> int:
        """Forget the sequence and return the bytes freed; the pages of its row stay for the next one, while idle."""
        sequence = self._sequence(handle)
        del self._sequences[handle.id]
        return self._space.cut(sequence, 0)

    def convert(self, handle: KVHandle, plan: int) -> KVHandle:
        """Raise IntegrityError: there is no other plan."""
        raise IntegrityError(f"the store has one plan, no number {plan} for sequence {handle.id}")

    def num_tokens(self, handle: KVHandle) -> int:
        """Return how many tokens the sequence holds."""
        return self._sequence(handle).num_tokens

    def tensors(self, handle: KVHandle, layer: int) -> tuple[Tensor, Tensor]:
        """Return views K ``[n, Hkv, Dk]`` and V ``[n, Hkv, Dv]`` of a sequence in one layer, in the stored dtype.

        What a sliding window has dropped reads as anything. They are of use until the sequence changes.
        """
        sequence, place = self._sequence(handle), self._place_of[layer]
        fmt = self.plan.formats[self._space.owners[place]]
        held = self._space.bytes_of(sequence, place, 0, sequence.num_tokens)  # none of any row where it has none
        k, v = BY_TOKEN.open(held, fmt)
        return k.transpose(0, 1), v.transpose(0, 1)

    def _adopt(self, sequence: RowSequence) -> KVHandle:
        handle = KVHandle(self._next_id)
        self._next_id += 1
        self._sequences[handle.id] = sequence
        return handle

    def _sequence(self, handle: KVHandle) -> RowSequence:
        sequence = self._sequences.get(handle.id)
        if sequence is None:
            raise IntegrityError(f"sequence {handle.id} is not open in this store")
        return sequence

    def _cut(self, sequence: RowSequence, num_tokens: int) -> int:
        sequence.num_tokens = min(sequence.num_tokens, num_tokens)
        sequence.step_start = min(sequence.step_start, num_tokens)
        sequence.expired_blocks = np.minimum(sequence.expired_blocks, blocks_of(num_tokens))
        return self._space.cut(sequence, num_tokens)

    def _check_rollback(self, sequence: RowSequence, num_tokens: int) -> None:
        if not 0 <= num_tokens <= sequence.num_tokens:
            raise IntegrityError(f"a sequence of {sequence.num_tokens} tokens has no prefix of {num_tokens}")
        for place in self._windowed:
            lost, holding = int(sequence.expired_blocks[place]), self._holdings[place]
            if lost > holding.expired(num_tokens):
                raise IntegrityError(
                    f"cannot go back to token {num_tokens}: tokens before {lost * STRIP_TOKENS} left the sliding "
                    f"window of {holding.window}",
                    "prefill the prefix again",
                )

    # A step

    def reserve(self, step: KVStep) -> Shortfall | None:
        """Commit all pages that ``step`` writes; or return what is missing and change nothing.

        Raises:
            IntegrityError: rows or positions are not what the sequences can take; nothing changes then.
        """
        rows = [self._sequence(handle) for handle in step.handles]
        check_rows(step, rows)
        starts = step.row_starts
        lasts, counts = step.positions[starts[1:] - 1].tolist(), np.diff(starts).tolist()
        for row, (sequence, last, count) in enumerate(zip(rows, lasts, counts, strict=True)):
            if count > 1 or last != sequence.num_tokens:
                check_positions(sequence, step.positions[starts[row] : starts[row + 1]])
        lengths = [max(sequence.num_tokens, last + 1) for sequence, last in zip(rows, lasts, strict=True)]
        growths = [Growth(*pair) for pair in zip(rows, lengths, strict=True)]
        shortfall = self._space.grow(growths)
        if shortfall is None:
            known = np.asarray(lengths, dtype=np.int64)
            step.prepared = _Prepared(rows, known, self._steps(step, rows, known), self._tables(rows, max(lengths)))
        return shortfall

    def _steps(self, step: KVStep, rows: Sequence[RowSequence], lengths: npt.NDArray[np.int64]) -> list[StripStep]:
        """Return the step as each layer sees it: they differ in what has left their windows."""
        made: dict[int | None, StripStep] = {}
        for place, holding in enumerate(self._holdings):
            if holding.window not in made:
                first = np.zeros(len(rows), dtype=np.int64)
                if holding.window is not None:
                    first = np.asarray([each.expired_blocks[place] for each in rows], dtype=np.int64) * STRIP_TOKENS
                made[holding.window] = StripStep(
                    row_starts=torch.from_numpy(step.row_starts),
                    positions=torch.from_numpy(step.positions),
                    lengths=torch.from_numpy(lengths),
                    first_slots=torch.from_numpy(first),
                )
        return [made[holding.window] for holding in self._holdings]

    def _tables(self, rows: Sequence[RowSequence], most_tokens: int) -> dict[int, StripTable]:
        """Return for each size of strips the table ``[R, blocks]`` of places that follow one another."""
        known, tables = self._batch
        numbers, width = [sequence.row for sequence in rows], blocks_of(most_tokens)
        if known == numbers and next(iter(tables.values())).shape[1] >= width:
            return tables
        tables, blocks = {}, np.arange(width + _SPARE_BLOCKS, dtype=np.int64)
        for place, strip_bytes in enumerate(self._space.strip_bytes.tolist()):
            if strip_bytes not in tables:
                starts = np.asarray(numbers, dtype=np.int64) * self._space.row_units(place)
                tables[strip_bytes] = (starts[:, None] + blocks * (strip_bytes // UNIT_BYTES)).astype(np.uint32)
        self._batch = numbers, tables
        return tables

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: KVStep, want: Want) -> AttnOut:
        """Append ``k, v`` of ``layer`` and return attention; needs a successful ``reserve(step)`` before."""
        spec, strips = self.plan.layers[layer], self.strips(layer, step)
        if spec.kv_source is None:
            attention.append(strips, k, v)
        result = AttnOut(*attention.attend(strips, spec, q))
        if want.colsum or want.pmax:
            column_statistics(result, want, q, spec, strips)
        return result

    def strips(self, layer: int, step: KVStep) -> LayerStrips:
        """Return where ``layer`` lies: strips that follow one another."""
        prepared, place = _prepared(step), self._place_of[layer]
        table = prepared.tables[int(self._space.strip_bytes[place])]
        fmt = self.plan.formats[self._space.owners[place]]
        return LayerStrips(prepared.steps[place], table, self._bases[place], fmt, BY_TOKEN)

    def end_layer(self, layer: int, step: KVStep) -> None:
        """Do nothing: no policy chooses."""

    def end_step(self, step: KVStep) -> None:
        """Make the new lengths final and give back the pages that sliding windows left behind.

        The last ``ROLLBACK_TOKENS`` of the step can still be taken back (speculation): no block goes for them yet.
        """
        prepared = _prepared(step)
        for sequence, length in zip(prepared.rows, prepared.lengths.tolist(), strict=True):
            sequence.step_start, sequence.num_tokens, sequence.writable = sequence.num_tokens, length, None
            if self._windowed:
                kept = [each.keeps_from(sequence.step_start, length) for each in self._holdings]
                self._expire(sequence, np.asarray(kept, dtype=np.int64))
        step.prepared = None

    def _expire(self, sequence: RowSequence, blocks: Blocks) -> None:
        """Forget the blocks before ``blocks``, for each layer."""
        if (blocks > sequence.expired_blocks).any():
            sequence.expired_blocks = np.maximum(blocks, sequence.expired_blocks)
            self._space.expire(sequence, self._space.first_pages(sequence.expired_blocks))

    def accept(self, handle: KVHandle, kept: Positions) -> None:
        """Keep only ``kept`` (ascending) of the last step's positions; they move to where the step began.

        Raises:
            IntegrityError: ``kept`` is not ascending or not of the last step; nothing changes then.
        """
        sequence = self._sequence(handle)
        start = sequence.step_start
        if kept.size and (kept[0] < start or kept[-1] >= sequence.num_tokens or (np.diff(kept) < 1).any()):
            raise IntegrityError(f"{kept.tolist()} are no ascending positions of {start}..{sequence.num_tokens - 1}")
        count = start + kept.size
        self._check_rollback(sequence, count)
        if (np.arange(start, count) != kept).any():
            sources = torch.from_numpy(kept.astype(np.int64) - start)
            for place in range(len(self._holdings)):
                part = self._space.bytes_of(sequence, place, start, sequence.num_tokens)
                tokens = part.view(sequence.num_tokens - start, -1)
                tokens[: kept.size] = tokens[sources]
        self._cut(sequence, count)

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

    def lend(self, handle: KVHandle, num_tokens: int) -> list[HeldBlock]:
        """Return where the bytes of the first ``num_tokens`` lie, one run a layer: the last block ends with its tokens.

        Raises:
            IntegrityError: the sequence is shorter, or a sliding window has dropped what the prefix needs.
        """
        sequence = self._sequence(handle)
        self._check_rollback(sequence, num_tokens)
        lent = []
        for place, first, end in self._pieces(0, num_tokens):
            bytes_ = memoryview(self._space.bytes_of(sequence, place, 0, num_tokens).numpy())  # type: ignore[arg-type]
            size, begin = int(self._space.strip_bytes[place]), self._space.row_start(sequence, place)
            for block in range(first, end):
                view = bytes_[block * size : (block + 1) * size]
                lent.append(HeldBlock(place, block, (begin + block * size,), (view,)))
        return lent

    def admit(self, num_tokens: int, plan: int = 0) -> KVHandle:
        """Return a new sequence of ``num_tokens``; its bytes are to be written where ``lend`` says.

        Raises:
            IntegrityError: ``plan`` is not 0.
            OutOfBudget: the pages do not fit, or no row is free; nothing changes then.
        """
        handle = self.open(plan)
        try:
            self._lengthen(self._sequence(handle), num_tokens)
        except BaseException:
            self.close(handle)
            raise
        return handle

    def export_span(self, handle: KVHandle, start: int, stop: int) -> bytes:
        """Return tokens ``[start, stop)`` as one checksummed object, the same that the paged store makes.

        Of a layer with a sliding window it holds what a query at ``stop`` or later could read.

        Raises:
            IntegrityError: ``start`` is not a multiple of 64, or a part of the span has expired.
        """
        sequence = self._sequence(handle)
        if start % STRIP_TOKENS or not 0 <= start < stop <= sequence.num_tokens:
            raise IntegrityError(
                f"tokens {start}..{stop} are no span of a sequence of {sequence.num_tokens}",
                f"start at a multiple of {STRIP_TOKENS}",
            )
        self._check_rollback(sequence, stop)
        strips = [
            self._plain_strip(sequence, place, block * STRIP_TOKENS, stop).numpy()
            for place, first, end in self._pieces(start, stop)
            for block in range(first, end)
        ]
        return pack_span(self.fingerprint, start, Extent(stop), strips)

    def import_span(self, handle: KVHandle, span: bytes) -> int:
        """Append an exported span; return the tokens added.

        Raises:
            IntegrityError: damaged bytes, another model or plan, or a span that does not start where the sequence ends.
            OutOfBudget: the pages do not fit. In either case nothing changes.
        """
        start, extent, _, payload = unpack_span(span, self.fingerprint, len(self.plan.layers))
        sequence, stop = self._sequence(handle), extent.num_tokens
        if start != sequence.num_tokens or start % STRIP_TOKENS:
            raise IntegrityError(f"the span starts at token {start}, the sequence ends at {sequence.num_tokens}")
        pieces, count = self._pieces(start, stop), stop - start
        strip_bytes = self._space.strip_bytes.tolist()
        if not extent.is_even or sum((end - first) * strip_bytes[place] for place, first, end in pieces) != len(
            payload
        ):
            raise IntegrityError(f"the KV span has {len(payload)} bytes of strips, not those of {count} tokens")
        self._cut(sequence, start)  # pages of a step that was reserved and never run
        self._lengthen(sequence, stop)
        self._read_pieces(sequence, pieces, payload, stop)
        return count

    def _lengthen(self, sequence: RowSequence, stop: int) -> None:
        """Lengthen ``sequence`` to ``stop`` tokens, with the pages that it would hold then."""
        start = sequence.num_tokens
        kept = np.asarray([holding.expired(stop) for holding in self._holdings], dtype=np.int64)
        first_pages = self._space.first_pages(np.where(kept * STRIP_TOKENS >= start, kept, sequence.expired_blocks))
        self._space.grow_for(f"a span of {stop - start} tokens", Growth(sequence, stop, first_pages))
        sequence.num_tokens = sequence.step_start = stop
        self._expire(sequence, kept)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return place, first and end block of each layer's strips of a span."""
        spans = ((place, max(each.expired(stop), start // STRIP_TOKENS)) for place, each in enumerate(self._holdings))
        return [(place, first, blocks_of(stop)) for place, first in spans if first < blocks_of(stop)]

    def _plain_strip(self, sequence: RowSequence, place: int, first: int, stop: int) -> Tensor:
        """Return tokens ``first .. stop - 1``, at most 64, as a plain strip; slots behind them are 0."""
        fmt, end = self.plan.formats[self._space.owners[place]], min(first + STRIP_TOKENS, stop)
        strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
        stored = BY_TOKEN.open(self._space.bytes_of(sequence, place, first, end), fmt)
        for target, part in zip(PLAIN.open(strip, fmt), stored, strict=True):
            target[:, : end - first] = part
        return strip

    def _read_pieces(
        self, sequence: RowSequence, pieces: Sequence[tuple[int, int, int]], payload: memoryview, stop: int
    ) -> None:
        """Write the strips of a span to where their tokens lie."""
        offset = 0
        for place, first, end in pieces:
            fmt = self.plan.formats[self._space.owners[place]]
            for block in range(first, end):
                begin, behind = block * STRIP_TOKENS, min((block + 1) * STRIP_TOKENS, stop)
                strip = torch.frombuffer(bytearray(payload[offset : offset + fmt.strip_bytes]), dtype=torch.uint8)
                stored = BY_TOKEN.open(self._space.bytes_of(sequence, place, begin, behind), fmt)
                for target, part in zip(stored, PLAIN.open(strip, fmt), strict=True):
                    target.copy_(part[:, : behind - begin])
                offset += fmt.strip_bytes

    # Bytes

    def resize(self, capacity_bytes: int) -> int:
        """Set the most bytes to hold; return how many are held above that."""
        capacity = self._space.capacity
        capacity.num_bytes = capacity_bytes
        return max(capacity.live_bytes - capacity_bytes, 0)

    def report(self) -> KVReport:
        """Return what is held."""
        sequences = list(self._sequences.values())
        tokens = sum(sequence.num_tokens for sequence in sequences)
        owners = [self.plan.layers[layer] for layer in self._space.owners]
        width = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in owners)
        held = [blocks_of(each.num_tokens) * len(owners) - int(each.expired_blocks.sum()) for each in sequences]
        return KVReport(
            live_bytes=self._space.live_bytes,
            free_bytes=self._space.free_bytes,
            capacity_bytes=self._space.capacity.num_bytes,
            num_sequences=len(sequences),
            num_tokens=tokens,
            num_strips=sum(held),
            num_shared_strips=0,
            num_dropped=0,
            bf16_bytes=tokens * width * 2,
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless exactly the pages of the sequences are committed, and charged."""
        sequences = list(self._sequences.values())
        rows = [sequence.row for sequence in sequences if sequence.row >= 0]
        if len(set(rows)) != len(rows) or any(each.num_tokens > each.room for each in sequences):
            raise IntegrityError("two sequences have one row, or one has more tokens than its pages hold")
        for sequence in sequences:
            if (sequence.first > self._space.first_pages(sequence.expired_blocks)).any():
                raise IntegrityError("a sequence lacks pages of tokens that did not leave a window")
        self._space.check(sequences)
        if self._arena.ledger.held(OWNER, self._arena.tier.name) < self._space.live_bytes:
            raise IntegrityError("the ledger charges fewer bytes than the pages that hold tokens")

    def close_all(self) -> None:
        """Close every sequence and give all pages back."""
        for handle_id in list(self._sequences):
            self.close(KVHandle(handle_id))
        self._space.close()


def _prepared(step: KVStep) -> _Prepared:
    if not isinstance(step.prepared, _Prepared):
        raise IntegrityError("the step was not reserved")
    return step.prepared
