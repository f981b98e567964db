"""Sequence: the strip table of one stored sequence. Pure bookkeeping, no bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.kv.pool import ABSENT

Table = npt.NDArray[np.uint32]
Layers = npt.NDArray[np.int64]


def blocks_of(num_tokens: int) -> int:
    """Return the blocks that hold ``num_tokens``."""
    return -(-num_tokens // STRIP_TOKENS)


class Sequence:
    """Length and table of a sequence; column b of the table holds the strips of tokens ``64 b .. 64 b + 63``.

    Args:
        num_layers: rows of the table.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_tokens = 0
        self.step_start = 0
        """Tokens before the last step; what came after them can be taken back (``accept``)."""
        self.num_blocks = 0
        self.shared_blocks = 0
        """Blocks before this one may be held by other sequences too; writing there needs a look."""
        self.expired_blocks = np.zeros(num_layers, dtype=np.int64)
        """For each layer, leading blocks that a sliding window has left behind."""
        self.writable: npt.NDArray[np.int64] | None = None
        """Stored positions that the next step may write again (repair)."""
        self.version = 0
        """Rises whenever the table changes."""
        self._table: Table = np.full((num_layers, 4), ABSENT, dtype=np.uint32)

    @property
    def table(self) -> Table:
        """Table ``[num_layers, num_blocks]``, to be read only."""
        return self._table[:, : self.num_blocks]

    def append(self, count: int) -> None:
        """Append ``count`` blocks without strips; ``put`` fills them."""
        self._grow(self.num_blocks + count)
        self.num_blocks += count
        self.version += 1

    def put(self, layers: Layers, blocks: npt.NDArray[np.int64], entries: Table) -> None:
        """Set the strips of some blocks; ``entries`` is ``[layers, blocks]``."""
        self._table[np.ix_(layers, blocks)] = entries
        self.version += 1

    def own(self, blocks: npt.NDArray[np.int64]) -> None:
        """Note that nobody else holds these ``blocks`` any more."""
        own = set(blocks.tolist())
        while self.shared_blocks - 1 in own:
            self.shared_blocks -= 1

    def cut(self, num_tokens: int) -> Table:
        """Shorten to ``num_tokens``; return the entries ``[num_layers, n]`` of the blocks let go."""
        keep = blocks_of(num_tokens)
        gone = self._table[:, keep : self.num_blocks].copy()
        self._table[:, keep : self.num_blocks] = ABSENT
        self.num_tokens = min(self.num_tokens, num_tokens)
        self.step_start = min(self.step_start, num_tokens)
        self.num_blocks = min(self.num_blocks, keep)
        self.shared_blocks = min(self.shared_blocks, keep)
        self.expired_blocks = np.minimum(self.expired_blocks, keep)
        self.version += 1
        return gone

    def copy_prefix(self, num_tokens: int) -> Sequence:
        """Return a sequence with the same first ``num_tokens``; both now know that those blocks are shared."""
        twin = Sequence(self._table.shape[0])
        blocks = blocks_of(num_tokens)
        twin.append(blocks)
        twin._table[:, :blocks] = self._table[:, :blocks]
        twin.num_tokens = twin.step_start = num_tokens
        twin.shared_blocks = blocks
        twin.expired_blocks = np.minimum(self.expired_blocks, blocks)
        self.shared_blocks = max(self.shared_blocks, blocks)
        return twin

    def expire(self, layers: Layers, num_blocks: int) -> Table:
        """Drop the first ``num_blocks`` blocks of ``layers`` (more than before); return the entries let go."""
        begin = int(self.expired_blocks[layers[0]])
        gone = self._table[layers, begin:num_blocks].copy()
        self._table[layers, begin:num_blocks] = ABSENT
        self.expired_blocks[layers] = num_blocks
        self.version += 1
        return gone

    def _grow(self, num_blocks: int) -> None:
        rows, room = self._table.shape
        if num_blocks > room:
            wider = np.full((rows, max(num_blocks, 2 * room)), ABSENT, dtype=np.uint32)
            wider[:, :room] = self._table
            self._table = wider
