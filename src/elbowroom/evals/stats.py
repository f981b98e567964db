"""Statistics of scores: intervals of a mean, and the difference of two runs on the same items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from elbowroom.errors import RequestError

K = TypeVar("K", bound=Hashable)
RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 250


def wilson_interval(num_correct: int, num_queries: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (95 % by default).

    Args:
        num_correct: successes.
        num_queries: trials; with none the interval is (0, 1).
        z: normal quantile of the confidence level.
    """
    if num_queries == 0:
        return 0.0, 1.0
    share, spread = num_correct / num_queries, z * z / num_queries
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num_queries + spread / (4 * num_queries))
    low = 0.0 if num_correct == 0 else centre - half
    return low, 1.0 if num_correct == num_queries else centre + half


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, from 10,000 resamples.

    Args:
        values: in any order, of which the result does not depend; without any the interval is (0, 1).
        seed: of the resamples.
    """
    if not values:
        return 0.0, 1.0
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    low, high = np.quantile(_resampled_means(ordered, seed), (0.025, 0.975))
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores: Wilson's if all are 0 or 1, else the bootstrap's."""
    if all(value in {0.0, 1.0} for value in values):
        return wilson_interval(int(sum(values)), len(values))
    return bootstrap_interval(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean of first minus second over the same items."""

    difference: float
    interval: tuple[float, float]
    """95 %, bootstrap over the items."""
    num_pairs: int
    num_better: int
    """Items on which the first is better."""
    num_worse: int


def paired_difference(first: Mapping[K, float], second: Mapping[K, float], seed: int = 0) -> PairedDifference:
    """Return the difference between two runs on the same items.

    Args:
        first: score of each item.
        second: likewise, of the same items.
        seed: of the 10,000 resamples.

    Raises:
        RequestError: the runs do not have the same items, or have none.
    """
    if not first or first.keys() != second.keys():
        alone = len(first.keys() ^ second.keys())
        raise RequestError(
            f"runs of {len(first)} and {len(second)} items, {alone} of them in one run only, cannot be paired",
            "compare runs of the same tasks, length and seed, without errors",
        )
    differences = [first[key] - second[key] for key in first]
    return PairedDifference(
        difference=math.fsum(differences) / len(differences),
        interval=bootstrap_interval(differences, seed),
        num_pairs=len(differences),
        num_better=sum(each > 0 for each in differences),
        num_worse=sum(each < 0 for each in differences),
    )


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the means of ``RESAMPLES`` samples of ``values`` with replacement, a part of them at a time."""
    rng, size = np.random.default_rng(seed), len(values)
    parts = [
        values[rng.integers(size, size=(_RESAMPLES_AT_ONCE, size), dtype=np.int32)].mean(axis=1)
        for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    return np.concatenate(parts)
