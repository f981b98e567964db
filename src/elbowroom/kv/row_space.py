"""RowSpace: one contiguous piece of address space for each sequence and layer, with pages only where tokens are.

A *row* is the place of one sequence: in every layer room for its longest length, one token behind the other. Pages are
committed as it grows and given back as it is cut, always one run ``[first, end)`` a layer. A row that is left keeps its
pages for the next sequence until the arena trims them (deferred reclamation; vAttention, arXiv 2405.04437).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import OutOfBudget
from elbowroom.kv.base import Shortfall
from elbowroom.kv.bound import BoundPlan, owns_kv
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.holding import ROLLBACK_TOKENS, blocks_of
from elbowroom.kv.pool import UNIT_BYTES
from elbowroom.memory.arena import Arena
from elbowroom.units import format_bytes

Pages = npt.NDArray[np.int64]

AHEAD_SHARE = 64
"""A row that grows gets one page in so many more than it needs, so that long ones do not grow in every step."""
_MOST_BYTES = 2**32 * UNIT_BYTES
"""What a strip table reaches in one layer."""


@dataclass(slots=True, eq=False)
class RowSequence:
    """A stored sequence; arrays have an entry for each layer that holds keys and values."""

    first: Pages
    """First committed page, counted from the begin of the row."""
    end: Pages
    """The page behind the last committed one."""
    expired_blocks: Pages
    """Leading blocks of 64 tokens that left a sliding window."""
    row: int = -1
    """-1: it has none, and no tokens."""
    num_tokens: int = 0
    step_start: int = 0
    """Tokens before the last step; what came after them can be taken back."""
    room: int = 0
    """Positions below this one can be written without another page."""
    writable: npt.NDArray[np.int64] | None = field(default=None)
    """Stored positions that the next step may write again."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What a sequence is to hold."""

    sequence: RowSequence
    num_tokens: int
    first: Pages | None = None
    """First page that is needed; None: the one that it has."""


def most_pages(plan: BoundPlan, num_tokens: int, page_bytes: int) -> Pages:
    """Return the most pages that a sequence of ``num_tokens`` needs between steps, for each layer that holds keys."""
    pages = []
    for layer, fmt in zip(plan.layers, plan.formats, strict=True):
        if owns_kv(layer):
            blocks, window = blocks_of(num_tokens), layer.window
            if window is not None:  # it may begin in the middle of a block, and of a page
                blocks = min(blocks, (window + ROLLBACK_TOKENS) // STRIP_TOKENS + 3)
            pages.append(-(-blocks * fmt.strip_bytes // page_bytes) + (window is not None))
    return np.asarray(pages, dtype=np.int64)


def with_ahead(pages: Pages) -> Pages:
    """Return how many pages are committed at most for ``pages`` that are needed."""
    return pages + pages // AHEAD_SHARE


class RowSpace:
    """Hands out rows and their pages.

    Args:
        plan: layers and formats.
        arena: of an elastic tier.
        owner: ledger account.
        capacity: most bytes of pages to hold, these and those of others that share it.
        num_rows: most sequences with tokens.
        row_tokens: most tokens of one.
        static: commit whole rows, as many as the capacity holds, at once and for good.
    """

    def __init__(
        self,
        plan: BoundPlan,
        arena: Arena,
        owner: str,
        capacity: Capacity,
        num_rows: int,
        row_tokens: int,
        static: bool = False,
    ) -> None:
        self._arena, self._page = arena, arena.tier.page_bytes
        self.capacity, self.static = capacity, static
        self.owners = [index for index, layer in enumerate(plan.layers) if owns_kv(layer)]
        """Layers that hold keys and values of their own."""
        self.strip_bytes = np.asarray([plan.formats[layer].strip_bytes for layer in self.owners], dtype=np.int64)
        self._token_bytes = self.strip_bytes // STRIP_TOKENS
        self.row_tokens = -(-row_tokens // STRIP_TOKENS) * STRIP_TOKENS
        self._row_pages: Pages = -(-self.row_tokens * self._token_bytes // self._page)
        self._most_held = np.minimum(self._row_pages, most_pages(plan, self.row_tokens, self._page))
        """What layers with a sliding window hold between steps."""
        row_bytes = int(self._row_pages.sum()) * self._page
        most = min(num_rows, _MOST_BYTES // (int(self._row_pages.max()) * self._page))
        self.num_rows = max(min(most, capacity.num_bytes // row_bytes) if static else most, 1)
        self._region: Pages = np.concatenate([[0], np.cumsum(self._row_pages)[:-1]]) * self.num_rows
        """First page of each layer."""
        self._range = arena.reserve(self.num_rows * row_bytes, owner)
        self._left: list[int] = []
        """Rows that were used and are free again."""
        self._fresh = 0
        """Rows from here on were never used."""
        if static:
            self._range.commit(np.zeros(1, dtype=np.int64), self.num_rows * row_bytes)
        capacity.holders.append(self)

    @property
    def live_bytes(self) -> int:
        """Bytes of committed pages."""
        return self._range.live_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of pages that are resident and committed to no row."""
        return self._range.free_bytes

    def new_sequence(self) -> RowSequence:
        """Return an empty sequence without a row."""
        none = np.zeros(len(self.owners), dtype=np.int64)
        return RowSequence(none, none.copy(), none.copy())

    def base(self, place: int) -> Tensor:
        """Return the bytes of all rows in the layer ``owners[place]``, uint8 ``[num_rows * row bytes]``."""
        start, count = int(self._region[place]), self.num_rows * int(self._row_pages[place])
        return self._range.base[start * self._page : (start + count) * self._page]

    def row_units(self, place: int) -> int:
        """Return the units of strip tables from one row to the next."""
        return int(self._row_pages[place]) * self._page // UNIT_BYTES

    def bytes_of(self, sequence: RowSequence, place: int, start: int, stop: int) -> Tensor:
        """Return tokens ``start .. stop - 1`` of a layer, uint8 ``[tokens * token bytes]``, contiguous."""
        begin, width = self.row_start(sequence, place), int(self._token_bytes[place])
        return self._range.base[begin + start * width : begin + stop * width]

    def row_start(self, sequence: RowSequence, place: int) -> int:
        """Return the byte of the range where a sequence begins in a layer."""
        return (int(self._region[place]) + max(sequence.row, 0) * int(self._row_pages[place])) * self._page

    def first_pages(self, blocks: Pages) -> Pages:
        """Return for each layer the page where a block begins."""
        return blocks * self.strip_bytes // self._page

    def grow(self, growths: Sequence[Growth]) -> Shortfall | None:
        """Commit the pages that ``growths`` need; or return what is missing and change nothing."""
        short = [each for each in growths if each.num_tokens > each.sequence.room]
        if not short:
            return None
        rows = self._choose_rows(short)
        too_long = max(each.num_tokens for each in short) > self.row_tokens
        if rows is None or too_long:
            row_bytes = int(self._row_pages.sum()) * self._page
            return Shortfall(row_bytes + self._page, row_bytes if too_long else 0)
        available, needed = self._available(), 0
        for share in (AHEAD_SHARE, 0):
            spans = [self._span(each, share) for each in short]
            needed = sum(int((end - begin).sum()) for begin, end in spans) * self._page
            if self.static or needed <= available:
                self._provide(short, rows, spans)
                return None
        return Shortfall(needed, max(available, 0))

    def grow_for(self, what: str, growth: Growth) -> None:
        """Do the same for ``what``, or explain in its words why not.

        Raises:
            OutOfBudget: the pages do not fit, or no row is free; nothing changes then.
        """
        missing = self.grow([growth])
        if missing is not None:
            raise OutOfBudget(
                f"{what} needs {format_bytes(missing.needed_bytes)} of KV memory; "
                f"{format_bytes(missing.available_bytes)} could be had",
                "raise memory= (--memory), or close sequences first",
            )

    def cut(self, sequence: RowSequence, num_tokens: int) -> int:
        """Give back the pages behind ``num_tokens``, and the row of an empty sequence; return the bytes."""
        if sequence.row < 0:
            return 0
        end = np.minimum(sequence.end, self._pages_of(num_tokens))
        end = np.maximum(end, sequence.first)
        freed = self._decommit(sequence, end, sequence.end)
        sequence.end = end
        if num_tokens == 0:
            self._left.append(sequence.row)
            sequence.row = -1
            sequence.first, sequence.end = np.zeros_like(end), np.zeros_like(end)
        self._note_room(sequence)
        return freed

    def expire(self, sequence: RowSequence, first: Pages) -> int:
        """Give back the pages before ``first``; return the bytes."""
        first = np.minimum(np.maximum(first, sequence.first), sequence.end)
        if self.static or (first == sequence.first).all():
            return 0
        freed = self._decommit(sequence, sequence.first, first)
        sequence.first = first
        return freed

    def check(self, sequences: Sequence[RowSequence]) -> None:
        """Raise IntegrityError unless exactly the pages of ``sequences`` are committed."""
        if not self.static:
            held = [self._numbers(each, each.first, each.end) for each in sequences if each.row >= 0]
            pages = np.concatenate([np.empty(0, dtype=np.int64), *held])
            self._range.check(pages * self._page, self._page)

    def close(self) -> None:
        """Give the whole range back."""
        self._range.close()

    def _pages_of(self, num_tokens: int) -> Pages:
        """Return the pages of a row that ``num_tokens`` reach into."""
        pages: Pages = -(-num_tokens * self._token_bytes // self._page)
        return pages

    def _span(self, growth: Growth, ahead_share: int) -> tuple[Pages, Pages]:
        """Return the pages ``begin .. end - 1`` to be committed."""
        sequence, needed = growth.sequence, self._pages_of(growth.num_tokens)
        first = sequence.first if growth.first is None else growth.first
        ahead = np.minimum(needed - first, self._most_held) // ahead_share if ahead_share else 0
        begin = np.maximum(sequence.end, first)
        end = np.where(needed > sequence.end, np.minimum(needed + ahead, self._row_pages), sequence.end)
        return begin, np.maximum(begin, end)

    def _provide(self, growths: Sequence[Growth], rows: Sequence[int], spans: Sequence[tuple[Pages, Pages]]) -> None:
        for growth, row in zip(growths, rows, strict=True):
            if growth.sequence.row < 0:
                growth.sequence.row = row
                if row == self._fresh:
                    self._fresh += 1
                else:
                    self._left.remove(row)
        if not self.static:
            pairs = zip(growths, spans, strict=True)
            pages = np.concatenate([self._numbers(growth.sequence, *span) for growth, span in pairs])
            self._range.commit(pages * self._page, self._page)
        for growth, (begin, end) in zip(growths, spans, strict=True):
            sequence = growth.sequence
            gone = begin > sequence.end  # what lies before was left behind by a window
            self._decommit(sequence, sequence.first, np.where(gone, sequence.end, sequence.first))
            sequence.first = np.where(gone | (sequence.first == sequence.end), begin, sequence.first)
            sequence.end = end
            self._note_room(sequence)

    def _decommit(self, sequence: RowSequence, begin: Pages, end: Pages) -> int:
        if self.static or (end <= begin).all():
            return 0
        return self._range.decommit(self._numbers(sequence, begin, end) * self._page, self._page)

    def _numbers(self, sequence: RowSequence, begin: Pages, end: Pages) -> Pages:
        """Return the pages ``begin .. end - 1`` of each layer of a row, as the range counts them."""
        counts = np.maximum(end - begin, 0)
        starts = self._region + sequence.row * self._row_pages + begin
        numbers: Pages = np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return numbers + np.arange(numbers.size, dtype=np.int64)

    def _note_room(self, sequence: RowSequence) -> None:
        if sequence.row < 0:
            sequence.room = 0
        elif self.static:
            sequence.room = self.row_tokens
        else:
            sequence.room = min(int((sequence.end * self._page // self._token_bytes).min()), self.row_tokens)

    def _choose_rows(self, growths: Sequence[Growth]) -> list[int] | None:
        """Return a row for each sequence; None: there are not so many."""
        left, fresh, chosen = list(self._left), self._fresh, []
        for growth in growths:
            row = growth.sequence.row
            if row < 0 and left:
                row = self._best_fit(left, growth.num_tokens)
                left.remove(row)
            elif row < 0:
                row, fresh = fresh, fresh + 1
            chosen.append(row)
        return chosen if fresh <= self.num_rows else None

    def _best_fit(self, rows: Sequence[int], num_tokens: int) -> int:
        """Return the row with the fewest resident pages that suffice, else the one with the most."""
        stride, wanted = int(self._row_pages[0]) * self._page, int(self._pages_of(num_tokens)[0]) * self._page
        warm = [self._range.resident_bytes(row * stride, (row + 1) * stride) for row in rows]
        suffices = [(each, row) for each, row in zip(warm, rows, strict=True) if each >= wanted]
        if suffices:
            return min(suffices)[1]
        return min(zip(warm, rows, strict=True), key=lambda each: (-each[0], each[1]))[1]

    def _available(self) -> int:
        """Return the bytes that may be taken on top."""
        room = self.capacity.num_bytes - self.capacity.live_bytes
        free = self._arena.ledger.available(self._arena.tier.name)
        return room if free is None else min(room, free + self._arena.free_bytes())
