"""The seam of read policies: how much of what is stored a decoding token reads, and in which layers.

What matters to a query is found by the kernels, from bounds on the keys of each strip (``kernels.digest``) or from a
part of each key. Tokens of prompts read everything.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from elbowroom.kernels.base import Reading
from elbowroom.kv.codecs import Codec


class ReadPolicy(Protocol):
    """One dataclass, one file a policy; parameters are its fields."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def digest_run(self) -> int | None:
        """Tokens that share bounds on their keys, a divisor of 64; None: it needs no bounds."""

    def check(self, codec: Codec) -> None:
        """Refuse codecs whose strips cannot be read that way.

        Raises:
            PlanError: names the way out.
        """

    def selects(self, layer: int) -> bool:
        """Return whether tokens choose what they read in ``layer``, if it has no sliding window."""

    def reading(self, rows: npt.NDArray[np.uint8]) -> Reading:
        """Return how the sequences read whose flag in ``rows``, uint8 ``[R]``, is 1."""
