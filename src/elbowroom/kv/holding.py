"""Holding: which token blocks of a sequence a pool holds, between steps and while one runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS

ROLLBACK_TOKENS = 64
"""Tokens at the end of the last step that can be taken back: sliding windows do not move on for them."""

Blocks = npt.NDArray[np.int64]
Part = Literal["all", "sealed", "tail", "staging", "fresh"]

NEVER = 2**40
"""A block that no sequence reaches."""


def blocks_of(num_tokens: int) -> int:
    """Return the blocks that hold ``num_tokens``."""
    return -(-num_tokens // STRIP_TOKENS)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a sequence reaches, and the exceptions that a policy made for its layers."""

    num_tokens: int
    dropped: tuple[int, ...] = ()
    """Blocks' worth of tokens that a policy dropped of each layer; empty: none."""
    open_from: tuple[int, ...] = ()
    """First block of each layer that waits, unsealed, for the end of a prompt; empty: none does."""

    @property
    def is_even(self) -> bool:
        """Whether layers hold the same blocks."""
        return not (self.dropped or self.open_from)


@dataclass(frozen=True, slots=True)
class Holding:
    """A rule of positions only.

    ``all`` blocks, where tokens are written one by one. Codecs that seal strips have three parts: full blocks are
    ``sealed``, the last one that is not full lies in the ``tail`` as it was computed; and blocks that a long step both
    begins and fills pass through ``staging``, which all layers use one after the other. So do the blocks of a step
    behind which a policy chooses; ``fresh`` sealed strips wait for what it keeps, and are in no table.

    A policy makes two exceptions: what it dropped is gone, and a prompt's blocks stay in the tail until it ends.
    """

    part: Part = "all"
    window: int | None = None
    """Sliding window in tokens; what no later token can read is dropped."""
    chosen: bool = False
    """A policy chooses among the tokens of these layers."""

    @property
    def drops(self) -> bool:
        """Whether blocks go while their sequence lives on."""
        return self.window is not None or self.part in ("tail", "staging")

    def rest(self, extent: Extent, layer: int) -> tuple[int, int]:
        """Return first and end block of what is held of a layer between steps."""
        end = blocks_of(extent.num_tokens)
        if self.part in ("staging", "fresh"):
            return end, end
        full = extent.num_tokens // STRIP_TOKENS
        if self.chosen and extent.open_from:
            full = min(full, extent.open_from[layer])
        if self.part == "tail":
            return full, end
        first = self.expired(extent.num_tokens)
        if self.chosen and extent.dropped:
            first = extent.dropped[layer]
        return first, full if self.part == "sealed" else end

    def expired(self, num_tokens: int) -> int:
        """Return the leading blocks that no query from position ``num_tokens`` on reads."""
        return 0 if self.window is None else max(num_tokens - self.window + 1, 0) // STRIP_TOKENS

    def written(self, blocks: Blocks, start: int, num_tokens: int) -> Blocks:
        """Return those of ``blocks``, which a step writes, that it writes here.

        Args:
            blocks: ascending.
            start: tokens before the step.
            num_tokens: tokens behind it.
        """
        if self.part == "all":
            return blocks
        full = blocks < num_tokens // STRIP_TOKENS
        if self.part == "fresh":
            return blocks[:0]
        if self.part == "sealed":
            return blocks[full]
        passing = full & (blocks * STRIP_TOKENS >= start) & (num_tokens - start > ROLLBACK_TOKENS)
        return blocks[passing if self.part == "staging" else ~passing]

    def keeps_from(self, start: int, num_tokens: int) -> int:
        """Return the first block that is kept behind a step from ``start`` to ``num_tokens`` tokens.

        The last ``ROLLBACK_TOKENS`` of a step can still be taken back, but for its first token where strips are
        sealed; a longer step than that, of a prompt, can not.
        """
        if self.part == "staging":
            return blocks_of(num_tokens)
        if self.part == "tail":
            certain = num_tokens if num_tokens - start > ROLLBACK_TOKENS else min(start + 1, num_tokens)
            return certain // STRIP_TOKENS
        return self.expired(max(start, num_tokens - ROLLBACK_TOKENS))
