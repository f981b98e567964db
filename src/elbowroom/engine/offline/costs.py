"""What steps cost on this machine: measured in a few short requests, or while a job runs, and fitted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from elbowroom.engine.engine import Engine
from elbowroom.engine.executors.base import LinearCostModel, StepShape
from elbowroom.engine.executors.measuring import MeasuringExecutor, non_negative
from elbowroom.engine.sampling_params import SamplingParams

_NEW_TOKENS = 6
_BATCH = 16
_CONTEXT_STEPS = 3
"""Full steps of the long prompt that is read."""


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
def recorded(engine: Engine) -> Iterator[MeasuringExecutor]:
    """Note the steps of ``engine`` during the block."""
    core = engine.parts.core

    def wrap() -> MeasuringExecutor:
        core.executor = made = MeasuringExecutor(core.executor)
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
    found = non_negative(rows / scale, np.ones(len(steps))) / scale
    return LinearCostModel(*found.tolist())
