"""MeasuringExecutor: what the steps of a real executor take, and the least squares that turn it into prices."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from elbowroom.engine.executors.base import Executor, StepShape
from elbowroom.engine.types import StepPlan, StepResult

BUSY_S = 5e-3
Matrix = npt.NDArray[np.float64]


@dataclass(slots=True)
class MeasuringExecutor:
    """Passes steps on to ``executor`` and keeps shape and seconds of each, those until the next one begins included.

    Planning and handing out tokens take time, too; longer pauses than ``BUSY_S`` are those of an engine without work.
    """

    executor: Executor
    steps: list[tuple[StepShape, float]] = field(default_factory=list)
    _shapes: dict[int, StepShape] = field(default_factory=dict)
    _ended: tuple[float, int] | None = None
    """When the last step that counts ended, and how often it was repeated."""

    def submit(self, plan: StepPlan) -> int:
        """Start a step."""
        if self._ended is not None:
            ended, num_steps = self._ended
            pause, (shape, seconds) = time.perf_counter() - ended, self.steps[-1]
            if pause <= BUSY_S:
                self.steps[-1] = shape, seconds + pause / num_steps
            self._ended = None
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
            self._ended = time.perf_counter(), result.num_steps
        return result


def non_negative(matrix: Matrix, wanted: Matrix) -> Matrix:
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
