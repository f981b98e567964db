"""How long prompts and answers are: distributions of token counts. Seeded by the caller's generator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from elbowroom.errors import RequestError

Counts = npt.NDArray[np.int64]
_ROUNDS = 64


class Lengths(Protocol):
    """Token counts, 1 or more."""

    def draw(self, count: int, generator: np.random.Generator) -> Counts:
        """Return ``count`` lengths in tokens, int64 ``[count]``."""


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """All alike."""

    num_tokens: int

    def draw(self, count: int, generator: np.random.Generator) -> Counts:
        """Return the one length ``count`` times."""
        return np.full(count, max(self.num_tokens, 1), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ZipfLengths:
    """Zipf with exponent ``a``, drawn again above ``most_tokens`` (as BurstGPT's generator does)."""

    a: float = 1.1
    most_tokens: int = 1024

    def draw(self, count: int, generator: np.random.Generator) -> Counts:
        """Return lengths."""
        if self.a <= 1:
            raise RequestError(f"a of zipf must be above 1, not {self.a!r}")
        made = generator.zipf(self.a, count)
        for _ in range(_ROUNDS):
            if not (above := made > self.most_tokens).any():
                break
            made[above] = generator.zipf(self.a, int(above.sum()))
        return np.minimum(made, self.most_tokens).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Log-normal with a mean and a coefficient of variation, cut off at ``most_tokens``."""

    mean_tokens: float
    cv: float = 1.0
    most_tokens: int = 2**31

    def draw(self, count: int, generator: np.random.Generator) -> Counts:
        """Return lengths."""
        variance = math.log1p(self.cv**2)
        made = generator.lognormal(math.log(self.mean_tokens) - variance / 2, math.sqrt(variance), count)
        return np.clip(np.rint(made), 1, self.most_tokens).astype(np.int64)


@dataclass(frozen=True, slots=True)
class HistogramLengths:
    """Each length with its own weight."""

    num_tokens: tuple[int, ...]
    weights: tuple[float, ...]
    """As many, 0 or more; their sum need not be 1."""

    def __post_init__(self) -> None:
        """Check that there is something to draw from."""
        if len(self.num_tokens) != len(self.weights) or not sum(self.weights) > 0 or min(self.weights) < 0:
            raise RequestError("a histogram of lengths needs a weight for each, none below 0 and one above")

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> Self:
        """Return the histogram of a mapping from length to weight."""
        return cls(tuple(weights), tuple(weights.values()))

    @classmethod
    def like(cls, lengths: Iterable[int]) -> Self:
        """Return the histogram of ``lengths``, each as likely as it occurs."""
        values, counts = np.unique(np.fromiter(lengths, dtype=np.int64), return_counts=True)
        return cls(tuple(values.tolist()), tuple(counts.tolist()))

    def draw(self, count: int, generator: np.random.Generator) -> Counts:
        """Return lengths."""
        weights = np.asarray(self.weights, dtype=np.float64)
        made: Counts = generator.choice(np.asarray(self.num_tokens, dtype=np.int64), count, p=weights / weights.sum())
        return np.maximum(made, np.int64(1))
