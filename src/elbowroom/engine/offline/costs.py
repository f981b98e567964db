"""What steps cost on this machine: measured in a few short requests, or while a job runs, and fitted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from elbowroom.engine.engine import Engine
from elbowroom.engine.executors.base import Executor, LinearCostModel, StepShape
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import StepPlan, StepResult

_NEW_TOKENS = 6
_BATCH = 16
_CONTEXT_STEPS = 3
"""Full steps of the long prompt that is read."""


@dataclass(slots=True)
class StepRecorder:
    """An executor that notes what the steps of another one take."""

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
        """Return what it made, and note its time."""
        result = self.executor.collect(ticket)
        shape = self._shapes.pop(ticket, None)
        if shape is not None and result.shortfall_bytes == 0:
            self.steps.append((shape, result.duration_s))
        return result


def measure_costs(engine: Engine, longest_prompt: int, seed: int = 0) -> LinearCostModel:
    """Let an idle engine read a prompt and answer alone and in a batch; return the fitted costs.

    Args:
        engine: left with an empty prefix cache.
        longest_prompt: tokens that the job's prompts have at most; no longer context is measured.
        seed: of the random prompts.
    """
    config, sizes = engine.parts.config, engine.parts.memory
    length = min(_CONTEXT_STEPS * sizes.max_step_tokens, longest_prompt, config.max_positions // 2)
    room = engine.parts.core.scheduler.account.pricings[0].largest(sizes.kv_bytes)
    length = max(min(length, room // 2), 1)
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [generator.randrange(config.vocab_size) for _ in range(count)]

    sampling = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    context = ids(length)
    engine.generate(ids(1), sampling).result()  # the first steps of a process are slow
    with recorded(engine) as recorder:
        for prompts in ([context], [context + ids(1) for _ in range(_BATCH)], [ids(4) for _ in range(_BATCH)]):
            for future in [engine.generate(each, sampling) for each in prompts]:
                future.result()
    engine.clear_cache()
    return fit(recorder.steps)


@contextmanager
def recorded(engine: Engine) -> Iterator[StepRecorder]:
    """Note the steps of ``engine`` during the block."""
    core = engine.parts.core

    def wrap() -> StepRecorder:
        core.executor = made = StepRecorder(core.executor)
        return made

    def unwrap() -> None:
        core.executor = recorder.executor

    recorder = engine.call(wrap).result()
    try:
        yield recorder
    finally:
        engine.call(unwrap).result()


def fit(steps: Sequence[tuple[StepShape, float]]) -> LinearCostModel:
    """Return the costs, none below zero, with the least squares of relative errors."""
    shapes = [(1.0, shape.num_tokens, shape.num_sampled, shape.context_tokens) for shape, _ in steps]
    seconds = np.asarray([max(each, 1e-7) for _, each in steps])
    rows = np.asarray(shapes, dtype=np.float64) / seconds[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    found = _non_negative(rows / scale, np.ones(len(steps))) / scale
    return LinearCostModel(*found.tolist())


def _non_negative(matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the best of all least-squares solutions over subsets of columns that has no negative entry."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), np.inf
    for subset in range(1, 2**columns):
        chosen = [column for column in range(columns) if subset >> column & 1]
        solution = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
        error = float(np.square(matrix[:, chosen] @ solution - target).sum())
        if (solution >= 0).all() and error < least:
            least, best = error, np.zeros(columns)
            best[chosen] = solution
    return best
