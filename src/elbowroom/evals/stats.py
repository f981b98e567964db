"""Statistics of 0/1 scores."""

from __future__ import annotations

import math


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
