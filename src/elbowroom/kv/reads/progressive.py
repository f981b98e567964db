"""Read policy ``progressive``: the high halves of keys first, the low ones and the values where they matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from elbowroom.errors import PlanError
from elbowroom.kernels.base import Progress
from elbowroom.kv.codecs import Codec


@dataclass(frozen=True, slots=True)
class ProgressivePolicy:
    """SpAtten's progressive quantization and local value pruning (Wang, Zhang and Han, HPCA 2021, arXiv 2012.09852).

    A decoding token scores all keys by their high plane. Where one token dominates the softmax of each query head, an
    error of the scores changes little (``dp = p (1 - p) ds``); a KV head with a query head whose largest probability is
    below ``tau`` reads the low plane too, which is added to the scores. Then it reads the values of the blocks that
    matter: those left out have at most ``eps`` of the probability together, and count as 0.

    Deviations from the paper: values are left out by their probability, not by their number, and a block of 64 tokens
    at a time, for all query heads of a KV head alike.

    Args:
        tau: 0: the low plane is never read; 1 or more: always.
        eps: probability that may be left out; 0: all values are read.
    """

    tau: float | str = 0.05
    eps: float | str = 0.001
    name: ClassVar[str] = "progressive"
    digest_run: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        checks = (("tau", math.inf, "0 or more"), ("eps", 1.0, "a share from 0 to below 1"))
        for name, end, fix in checks:
            value = getattr(self, name)
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if not 0 <= number < end:
                raise PlanError(f"KV read policy 'progressive' cannot take {name}={value}", f"give {name} as {fix}")
            object.__setattr__(self, name, number)

    def check(self, codec: Codec) -> None:
        """Refuse codecs whose keys do not lie in planes.

        Raises:
            PlanError: names the one that has them.
        """
        if codec.name != "planes":
            raise PlanError(
                f"KV read policy 'progressive' reads one half of each key before the other; codec {codec.name!r} keeps "
                "them together",
                "use the codec that has them apart: progressive | planes",
            )

    def selects(self, layer: int) -> bool:
        """Return True: each layer decides for itself."""
        return True

    def reading(self, rows: npt.NDArray[np.uint8]) -> Progress:
        """Return how the sequences read whose flag in ``rows``, uint8 ``[R]``, is 1."""
        return Progress(float(self.tau), float(self.eps), rows)
