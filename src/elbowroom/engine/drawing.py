"""Drawing tokens from logits: greedy, or by temperature, top-k, top-p and min-p. Written to be read.

This is the oracle of native/sampling.cpp, which does the same for many rows at once, and what runs where nothing
native was built. Tokens are ordered by falling logit, then by rising id; each of top-k, top-p and min-p keeps a
beginning of that order.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.kernels.attention import backend_name

BROKEN = -1
"""Stands for the token of a row whose greatest logit is not finite."""
_MASK = 2**64 - 1
_RECORD = struct.Struct("=dddqQQ")
"""Layout of ``Draw`` in native/sampling.h."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn, whatever its position."""

    temperature: float
    """0 is greedy."""
    top_k: int
    """0 keeps all."""
    top_p: float
    min_p: float
    seed: int
    sample: int
    packed: bytes = field(init=False, repr=False)
    """The same for native code."""

    def __post_init__(self) -> None:
        """Pack it, once for all steps."""
        numbers = (self.temperature, self.top_p, self.min_p, self.top_k, self.seed & _MASK, self.sample)
        object.__setattr__(self, "packed", _RECORD.pack(*numbers))

    @classmethod
    def of(cls, params: SamplingParams, seed: int, sample: int) -> Draw:
        """Return how sample ``sample`` of a request with ``params`` is drawn."""
        temperature = 0.0 if params.is_greedy else params.temperature
        return cls(temperature, max(params.top_k, 0), params.top_p, params.min_p, seed, sample)


class DrawRows(Protocol):
    """A backend: draws one token for each row, which depends on nothing but that row and its keys."""

    def __call__(self, logits: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> list[int]:
        """Return R tokens for float32 logits ``[R, V]``; BROKEN where the greatest is NaN or infinite."""


@functools.cache
def backend() -> DrawRows:
    """Return what this process draws with; ``ELBOWROOM_KERNELS`` chooses it together with attention."""
    return draw_natively if backend_name() == "native" else draw_in_torch


def draw_natively(logits: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> list[int]:
    """Draw by native/sampling.cpp.

    Raises:
        ValueError: the logits are not float32 rows on the CPU, or not as many as ``draws``.
    """
    from elbowroom.kernels import native_sampling  # absent where nothing native was built

    return native_sampling.sample(logits, b"".join([draw.packed for draw in draws]), positions)


def draw_in_torch(logits: Tensor, draws: Sequence[Draw], positions: Sequence[int]) -> list[int]:
    """Draw row by row."""
    return [_token(row, draw, position) for row, draw, position in zip(logits, draws, positions, strict=True)]


def uniform(seed: int, sample: int, position: int) -> float:
    """Return a number in [0, 1) that depends on the three keys only (SplitMix64 finaliser over their mix)."""
    x = (seed ^ (sample * 0xD1342543DE82EF95) ^ (position * 0x9E3779B97F4A7C15)) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / 2.0**53


def _token(logits: Tensor, draw: Draw, position: int) -> int:
    highest, best = logits.max(dim=-1)  # NaN counts as the highest
    if not bool(torch.isfinite(highest)):
        return BROKEN
    if draw.temperature == 0:
        return int(best)
    return choose(logits, draw, uniform(draw.seed, draw.sample, position))


def choose(logits: Tensor, draw: Draw, point: float) -> int:
    """Return the token of ``logits [V]`` at which the share of weight so far passes ``point`` in [0, 1).

    What is cut off is left out. Without any cut the walk is in the order of ids, which needs no sorting.
    """
    weights = torch.exp((logits - logits.max()) / draw.temperature).double()
    if draw.top_k == 0 and draw.top_p >= 1.0 and draw.min_p == 0.0:
        return _pick(weights, point)
    order = _in_order(logits, draw.top_k)
    weights = weights[order]
    mass_before = weights.cumsum(dim=0) - weights
    kept = (mass_before < draw.top_p * weights.sum()) | (draw.top_p >= 1.0)
    kept &= weights >= draw.min_p
    return int(order[_pick(weights[kept], point)])


def _in_order(logits: Tensor, top_k: int) -> Tensor:
    """Return the ids of the ``top_k`` first tokens of the order, of all when it is 0."""
    ids = torch.arange(logits.numel())
    if 0 < top_k < logits.numel():
        ids = ids[logits >= logits.topk(top_k).values[-1]]  # and perhaps some more, equal to the last of them
    return ids[logits[ids].argsort(descending=True, stable=True)][: top_k or None]


def _pick(weights: Tensor, point: float) -> int:
    """Return the index at which the cumulated weight passes its share ``point``."""
    cumulative = weights.cumsum(dim=0)
    index = int(torch.searchsorted(cumulative, point * cumulative[-1:], right=True))
    return min(index, weights.numel() - 1)
