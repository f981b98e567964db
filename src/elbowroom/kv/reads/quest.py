"""Read policy ``quest``: the blocks of tokens whose keys can score highest with the query."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import PlanError
from elbowroom.kernels.base import Selection
from elbowroom.kv.codecs import Codec

_FEWEST_BLOCKS = 3
_MOST = 2**31
_RUNS = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class QuestPolicy:
    """Quest (Tang et al., arXiv 2406.10774): a token reads the blocks with the highest bound on ``q . k``.

    A run of tokens can score ``sum_d max(q_d * min_d, q_d * max_d)`` at most, over its keys; a block is worth what the
    best of its runs is, to the best of the query heads that share a KV head. Each KV head reads as many whole blocks
    as fit into ``tokens``.

    Deviations from the paper: blocks of 64 tokens are read instead of 16; the first block (attention sinks) is always
    read, as is the newest; query heads that share keys share the choice (the paper's models have none that do); of
    sealed strips (codec ``kivi``) the bounds are those of the codes, for each group, so they take no bytes.

    Args:
        tokens: most tokens that a KV head reads.
        skip: leading layers that read everything.
        run: tokens that share bounds, 16, 32 or 64: fewer say more and take more bytes.
    """

    tokens: int | str = 1024
    skip: int | str = 2
    run: int | str = 16
    name: ClassVar[str] = "quest"

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        least = _FEWEST_BLOCKS * STRIP_TOKENS
        checks: tuple[tuple[str, Container[int], str], ...] = (
            (
                "tokens",
                range(least, _MOST),
                f"{least} or more: the first and the newest {STRIP_TOKENS} and some to choose",
            ),
            ("skip", range(_MOST), "a number of layers, 0 or more"),
            ("run", _RUNS, "16, 32 or 64"),
        )
        for name, allowed, fix in checks:
            value = getattr(self, name)
            try:
                number = int(value)
            except ValueError:
                number = -1
            if number not in allowed:
                raise PlanError(f"KV read policy 'quest' cannot take {name}={value}", f"give {name} as {fix}")
            object.__setattr__(self, name, number)

    @property
    def digest_run(self) -> int:
        """Tokens that share bounds."""
        return int(self.run)

    @property
    def num_blocks(self) -> int:
        """Whole blocks that fit into the budget."""
        return int(self.tokens) // STRIP_TOKENS

    def selects(self, layer: int) -> bool:
        """Return whether the layer is not one of the first, whose attention is spread widely."""
        return layer >= int(self.skip)

    def check(self, codec: Codec) -> None:
        """Take every codec: all tell bounds on their keys."""

    def reading(self, rows: npt.NDArray[np.uint8]) -> Selection:
        """Return how the sequences read whose flag in ``rows``, uint8 ``[R]``, is 1."""
        return Selection(self.num_blocks, rows)
