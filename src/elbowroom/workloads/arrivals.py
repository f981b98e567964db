"""When requests come: gaps between them drawn from a distribution. Seeded by the caller's generator.

A closed loop, in which users wait for answers before they ask again, has no arrival times of its own: the drivers add a
request when one ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from elbowroom.errors import RequestError

Seconds = npt.NDArray[np.float64]


class Arrivals(Protocol):
    """Gaps between requests."""

    def times(self, count: int, generator: np.random.Generator) -> Seconds:
        """Return ``count`` arrival times in seconds, ascending, float64 ``[count]``."""


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Users who do not know of one another: exponential gaps."""

    rate: float
    """Requests a second."""

    def times(self, count: int, generator: np.random.Generator) -> Seconds:
        """Return arrival times."""
        _positive("rate", self.rate)
        return np.cumsum(generator.exponential(1.0 / self.rate, count))


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Bursts: gaps from Gamma(shape ``1 / cv^2``, scale ``cv^2 / rate``) (BurstGPT, arXiv 2401.17644)."""

    rate: float
    """Requests a second."""
    cv: float = 1.0
    """Standard deviation over mean of the gaps: 1 is Poisson, above it bursts, below it is even."""

    def times(self, count: int, generator: np.random.Generator) -> Seconds:
        """Return arrival times."""
        _positive("rate", self.rate)
        _positive("cv", self.cv)
        return np.cumsum(generator.gamma(self.cv**-2, self.cv**2 / self.rate, count))


@dataclass(frozen=True, slots=True)
class WeibullArrivals:
    """Gaps from a Weibull distribution, which some clients of ServeGen follow (arXiv 2505.09999)."""

    rate: float
    """Requests a second."""
    shape: float = 1.0
    """1 is Poisson, below it bursts."""

    def times(self, count: int, generator: np.random.Generator) -> Seconds:
        """Return arrival times."""
        from math import gamma

        _positive("rate", self.rate)
        _positive("shape", self.shape)
        mean = gamma(1.0 + 1.0 / self.shape)
        return np.cumsum(generator.weibull(self.shape, count) / (mean * self.rate))


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise RequestError(f"{name} of arrivals must be above 0, not {value!r}")
