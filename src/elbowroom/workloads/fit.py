"""Fits the simulator's costs to steps that a real executor took."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elbowroom.engine.executors.base import ServingCostModel, StepShape
from elbowroom.engine.executors.measuring import non_negative
from elbowroom.errors import RequestError


def fit_costs(steps: Sequence[tuple[StepShape, float]]) -> ServingCostModel:
    """Return the costs, none below 0, whose prices are nearest to the measured ones in relative squares.

    Relative, so that the many short decode steps count as much as the few long prefills; the slowest hundredth of
    steps, which others on the machine held up, is left out.

    Raises:
        RequestError: there are fewer steps than costs.
    """
    if len(steps) < 8:
        raise RequestError(f"{len(steps)} measured steps are too few to fit costs", "replay more requests")
    facts = [(1, shape.num_prefill_tokens, shape.num_decode_rows, shape.kv_tokens) for shape, _ in steps]
    features = np.asarray(facts, dtype=np.float64)
    seconds = np.maximum(np.asarray([each for _, each in steps], dtype=np.float64), 1e-7)
    kept = np.ones(seconds.size, dtype=bool)
    for _ in range(2):
        costs = non_negative(features[kept] / seconds[kept, None], np.ones(int(kept.sum())))
        excess = seconds / np.maximum(features @ costs, 1e-12)
        kept = excess <= np.quantile(excess, 0.99)
    return ServingCostModel(*costs.tolist())
