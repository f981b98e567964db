"""Fits the simulator's costs to steps that a real executor took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from elbowroom.engine.executors.base import Executor, ServingCostModel, StepShape
from elbowroom.engine.types import StepPlan, StepResult
from elbowroom.errors import RequestError


@dataclass(slots=True)
class MeasuringExecutor:
    """Passes steps on to ``executor`` and keeps shape and seconds of each."""

    executor: Executor
    steps: list[tuple[StepShape, float]] = field(default_factory=list)
    _shapes: dict[int, StepShape] = field(default_factory=dict)

    def submit(self, plan: StepPlan) -> int:
        """Start a step."""
        ticket = self.executor.submit(plan)
        if plan.rows:
            self._shapes[ticket] = StepShape.of(plan)
        return ticket

    def collect(self, ticket: int) -> StepResult:
        """Wait for a step; what it took is per repetition."""
        result = self.executor.collect(ticket)
        shape = self._shapes.pop(ticket, None)
        if shape is not None and result.shortfall_bytes == 0:
            self.steps.append((shape, result.duration_s / result.num_steps))
        return result


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
        costs = _non_negative(features[kept] / seconds[kept, None], np.ones(int(kept.sum())))
        excess = seconds / np.maximum(features @ costs, 1e-12)
        kept = excess <= np.quantile(excess, 0.99)
    return ServingCostModel(*costs.tolist())


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return x >= 0 that minimises ``|matrix x - wanted|^2``: least squares over every set of columns kept.

    With four columns there are fifteen sets, so all of them are tried.
    """
    best, least = np.zeros(matrix.shape[1]), float("inf")
    for chosen in range(1, 2 ** matrix.shape[1]):
        columns = [column for column in range(matrix.shape[1]) if chosen >> column & 1]
        found = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
        error = float(((matrix[:, columns] @ found - wanted) ** 2).sum())
        if found.min() >= 0 and error < least:
            least, best = error, np.zeros(matrix.shape[1])
            best[columns] = found
    return best
