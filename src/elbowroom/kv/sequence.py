"""Sequence: the strip table of one stored sequence. Pure bookkeeping, no bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elbowroom.kv.cascade import TokenHistory
from elbowroom.kv.heads import Places
from elbowroom.kv.holding import NEVER, Blocks, blocks_of
from elbowroom.kv.pool import ABSENT

Table = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.int64]


class Sequence:
    """Length and table of a sequence; column b of the table holds the strips of tokens ``64 b .. 64 b + 63``.

    Args:
        num_rows: rows of the table: one for each layer, and more where a layer has several kinds of strips.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_tokens = 0
        self.step_start = 0
        """Tokens before the last step; what came after them can be taken back (``accept``)."""
        self.room = 0
        """Positions below this one can be written without another strip, if no block is shared."""
        self.expected_tokens = 0
        """How long it will be, if anybody said so."""
        self.num_blocks = 0
        self.shared_blocks = 0
        """Blocks before this one may be held by other sequences too; writing there needs a look."""
        self.expired_blocks = np.zeros(num_rows, dtype=np.int64)
        """For each row, leading blocks that are gone: behind a window, or blocks' worth of what a policy dropped."""
        self.open_from = np.full(num_rows, NEVER, dtype=np.int64)
        """For each layer, the first block of a prompt that waits, unsealed, for its end; NEVER between prompts."""
        self.open_start = 0
        """Tokens before that prompt: who goes back to them has none that waits."""
        self.chosen_tokens = 0
        """Tokens when a policy chose the last time: what lies before cannot be gone back to."""
        self.history: TokenHistory | None = None
        """What a cascade knows of the tokens from that time."""
        self.places: Places = ()
        """Which KV heads stay, once they were chosen."""
        self.writable: npt.NDArray[np.int64] | None = None
        """Stored positions that the next step may write again (repair)."""
        self.spare: Table = np.empty((num_rows, 0), dtype=np.uint32)
        """Strips ``[num_rows, n]`` for tokens that a policy is about to choose."""
        self.version = 0
        """Rises whenever the table changes."""
        self._table: Table = np.full((num_rows, 4), ABSENT, dtype=np.uint32)

    @property
    def table(self) -> Table:
        """Table ``[num_rows, num_blocks]``, to be read only."""
        return self._table[:, : self.num_blocks]

    @property
    def is_open(self) -> bool:
        """Whether blocks of a prompt wait for its end."""
        return bool((self.open_from < NEVER).any())

    def missing(self, row: int, blocks: Blocks) -> Blocks:
        """Return those of ``blocks`` without a strip in ``row``."""
        self._grow(int(blocks[-1]) + 1 if blocks.size else 0)
        found: Blocks = blocks[self._table[row, blocks] == ABSENT]
        return found

    def holds(self, row: int, block: int) -> bool:
        """Return whether ``row`` has a strip for ``block``."""
        return block < self.num_blocks and bool(self._table[row, block] != ABSENT)

    def put(self, rows: Rows, blocks: Blocks, entries: Table) -> None:
        """Set the strips of some blocks; ``entries`` is ``[rows, blocks]``."""
        if blocks.size:
            end = int(blocks[-1]) + 1
            self._grow(end)
            self._table[np.ix_(rows, blocks)] = entries
            self.num_blocks = max(self.num_blocks, end)
            self.version += 1

    def own(self, blocks: Blocks) -> None:
        """Note that nobody else holds these ``blocks`` any more."""
        own = set(blocks.tolist())
        while self.shared_blocks - 1 in own:
            self.shared_blocks -= 1

    def expire(self, rows: Rows, num_blocks: int) -> Table:
        """Drop the first ``num_blocks`` blocks of ``rows`` (not fewer than before); return the entries let go."""
        begin = int(self.expired_blocks[rows[0]])
        self.expired_blocks[rows] = num_blocks
        return self._take_out(rows, begin, num_blocks)

    def cut(self, rows: Rows, end: int) -> Table:
        """Drop the blocks of ``rows`` from ``end`` on; return the entries let go."""
        return self._take_out(rows, end, self.num_blocks)

    def shorten(self, num_tokens: int) -> None:
        """Note that blocks behind ``num_tokens`` were cut from all rows."""
        blocks = blocks_of(num_tokens)
        self.num_tokens = min(self.num_tokens, num_tokens)
        self.step_start = min(self.step_start, num_tokens)
        self.num_blocks = min(self.num_blocks, blocks)
        self.shared_blocks = min(self.shared_blocks, blocks)
        self.expired_blocks = np.minimum(self.expired_blocks, blocks)
        self._close_behind()
        self.version += 1

    def _close_behind(self) -> None:
        """Note that no prompt waits for its end any more, if none of its tokens is left."""
        if self.num_tokens <= self.open_start:
            self.open_from[:] = NEVER

    def prefix(self, num_tokens: int) -> Sequence:
        """Return a sequence of the first ``num_tokens`` without strips; both know that their blocks are shared."""
        twin = Sequence(self._table.shape[0])
        twin.num_tokens = twin.step_start = num_tokens
        twin.shared_blocks = blocks_of(num_tokens)
        twin.expired_blocks = np.minimum(self.expired_blocks, twin.shared_blocks)
        twin.chosen_tokens, twin.open_from = self.chosen_tokens, self.open_from.copy()
        twin.open_start = self.open_start
        twin._close_behind()
        twin.history, twin.places = self.history, self.places
        self.shared_blocks = max(self.shared_blocks, twin.shared_blocks)
        return twin

    def take_spare(self, row: int, count: int) -> Table:
        """Return ``count`` of the spare strips of ``row``, which has none left of them then."""
        taken = self.spare[row, :count].copy()
        self.spare[row, :count] = ABSENT
        return taken

    def replace(self, row: int, first: int, entries: Table) -> Table:
        """Let ``row`` hold ``entries [n]`` from block ``first`` on and nothing else; return what it held."""
        held = self._table[row, : self.num_blocks].copy()
        self._table[row] = ABSENT
        self.expired_blocks[row] = first
        self.put(np.asarray([row]), np.arange(first, first + entries.size), entries[None])
        return held

    def _take_out(self, rows: Rows, begin: int, end: int) -> Table:
        gone = self._table[rows, begin:end].copy()
        self._table[rows, begin:end] = ABSENT
        self.version += 1
        return gone

    def _grow(self, num_blocks: int) -> None:
        rows, room = self._table.shape
        if num_blocks > room:
            wider = np.full((rows, max(num_blocks, 2 * room)), ABSENT, dtype=np.uint32)
            wider[:, :room] = self._table
            self._table = wider
