"""SwapCost: what it takes to write bytes to an object tier and to read them back, measured once at the start."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import numpy as np

from elbowroom.memory.objects import Completion, ObjectTier, Part

_KEY = "calibration"
_PIECES = 2048
"""Copies of the run in small ones."""


@dataclass(frozen=True, slots=True)
class SwapCost:
    """A transfer costs something for itself, for each byte and for each run of bytes."""

    write_bytes_per_s: float
    read_bytes_per_s: float
    copy_s: float = 0.0
    transfer_s: float = 0.0

    def write_seconds(self, num_bytes: float, num_copies: float) -> float:
        """Return the seconds of writing."""
        return self.transfer_s + num_bytes / self.write_bytes_per_s + num_copies * self.copy_s

    def read_seconds(self, num_bytes: float, num_copies: float) -> float:
        """Return the seconds of reading."""
        return self.transfer_s + num_bytes / self.read_bytes_per_s + num_copies * self.copy_s


def measure_swap_cost(tier: ObjectTier, num_bytes: int = 4 << 20, repeats: int = 3) -> SwapCost:
    """Write and read ``num_bytes`` as one run and as many, and a single byte; return what that says of ``tier``.

    The memory for it is held for the moment of the measurement only. Nothing else may be under way.

    Raises:
        OSError: the tier cannot be written; it says why.
    """
    content = np.arange(num_bytes, dtype=np.uint8).data
    step = num_bytes // _PIECES
    pieces = [content[start : start + step] for start in range(0, step * _PIECES, step)]
    whole = [_round(tier, [content]) for _ in range(repeats)]
    write_s, read_s = (statistics.median(times) for times in zip(*whole, strict=True))
    many_s = statistics.median(_round(tier, pieces)[0] for _ in range(repeats))
    least_s = statistics.median(_round(tier, [content[:1]])[0] for _ in range(repeats))
    tier.delete(_KEY)
    return SwapCost(num_bytes / write_s, num_bytes / read_s, max(many_s - write_s, 0.0) / _PIECES, least_s)


def _round(tier: ObjectTier, views: list[memoryview]) -> tuple[float, float]:
    """Return the seconds of writing ``views`` and of reading them."""
    put = _finish(tier, tier.submit_put(_KEY, [views]))
    got = _finish(tier, tier.submit_get(_KEY, [Part(0, _writable(views), put.checksums[0])]))
    return put.seconds, got.seconds


def _writable(views: list[memoryview]) -> list[memoryview]:
    whole = np.empty(sum(view.nbytes for view in views), dtype=np.uint8).data
    starts = np.cumsum([0, *(view.nbytes for view in views)]).tolist()
    return [whole[start:end] for start, end in itertools.pairwise(starts)]


def _finish(tier: ObjectTier, ticket: int) -> Completion:
    while True:
        for done in tier.poll(1.0):
            if done.ticket == ticket:
                if done.error is not None:
                    raise OSError(done.error)
                return done
