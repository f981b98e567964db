"""Budgets that differ by layer: more tokens where attention loses more without them."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_TOKENS = 32
"""What every layer gets before the rest is divided."""
MOST_SHARE = 3
"""No layer gets more than so many times the mean."""


def layer_budgets(errors: Sequence[float], mean_tokens: int, least_tokens: int = LEAST_TOKENS) -> list[int]:
    """Return the tokens of each layer, which sum to ``mean_tokens`` times their number.

    The rule of CompressKV (arXiv 2508.02401): 32 for each layer and a share of the rest by its error, bounded; then
    single tokens are added to the layers with the greatest errors, or taken from those with the least.

    Args:
        errors: of each layer, at least 0 and not all 0.
        mean_tokens: tokens of a layer on average, at least ``least_tokens``.
        least_tokens: fewest tokens of a layer.
    """
    total, scale = mean_tokens * len(errors), math.fsum(errors)
    rest = total - LEAST_TOKENS * len(errors)
    most_tokens = MOST_SHARE * mean_tokens
    wanted = [LEAST_TOKENS + round(error / scale * rest) for error in errors]
    budgets = [min(max(tokens, least_tokens), most_tokens) for tokens in wanted]
    greatest = sorted(range(len(errors)), key=lambda index: -errors[index])
    while (missing := total - sum(budgets)) != 0:
        step, bound = (1, most_tokens) if missing > 0 else (-1, least_tokens)
        open_layers = [index for index in greatest[::step] if budgets[index] != bound]
        for index in open_layers[: abs(missing)]:
            budgets[index] += step
    return budgets
