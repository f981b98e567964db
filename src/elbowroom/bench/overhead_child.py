"""The measured process of ``overhead``: one engine whose parts are timed from outside, step by step.

``python -m elbowroom.bench.overhead_child '{"batch": 8, "prompt_tokens": 8, "new_tokens": 192, "seed": 0}'``.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elbowroom.bench.patching import replaced
from elbowroom.engine import core, output, scheduler
from elbowroom.engine.executors import local
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import StepPlan
from elbowroom.kv import paged
from elbowroom.models import decoder, native

PARTS: tuple[tuple[str, object, str], ...] = (
    ("schedule", scheduler.Scheduler, "schedule"),
    ("prepare", local.TorchExecutor, "submit"),
    ("prepare", paged.PagedStore, "reserve"),
    ("prepare", paged.PagedStore, "end_step"),
    ("model", decoder.Decoder, "step"),
    ("model", native.NativeDecoder, "step"),
    ("sampling", local, "sample"),
    ("update", scheduler.Scheduler, "update"),
    ("deliver", output.RequestProcessor, "push"),
    ("deliver", core.EngineCore, "step"),
)
"""Part, owner and name of what is timed; a call inside a timed call counts for its own part only."""


class StepProfile:
    """Seconds by part of each step; all calls are on the engine's thread."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        """Seconds by part, ``total`` and ``between`` (from the step before) of every step."""
        self.plans: list[StepPlan] = []
        """What each of them computed."""
        self._spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._ended = time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its seconds, less those of timed calls inside, added to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self._spent[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return call

    def planning(self, function: Callable[..., StepPlan]) -> Callable[..., StepPlan]:
        """Return ``schedule`` with its plans kept."""

        def call(*args: Any) -> StepPlan:
            self.plans.append(function(*args))
            return self.plans[-1]

        return call

    def stepping(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return ``step`` with the books closed behind each."""

        def call(*args: Any) -> None:
            started = time.perf_counter()
            self._spent.clear()
            function(*args)
            between, self._ended = started - self._ended, time.perf_counter()
            self.steps.append({**self._spent, "total": self._ended - started, "between": between})

        return call


def measure(spec: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the seconds by part of all steps in which exactly ``batch`` streams decode, but for the first five."""
    profile, batch = StepProfile(), spec["batch"]
    with contextlib.ExitStack() as patches:
        for part, owner, name in PARTS:
            patches.enter_context(replaced(owner, name, profile.timed(part, getattr(owner, name))))
        schedule, step = scheduler.Scheduler.schedule, core.EngineCore.step
        patches.enter_context(replaced(scheduler.Scheduler, "schedule", profile.planning(schedule)))
        patches.enter_context(replaced(core.EngineCore, "step", profile.stepping(step)))
        with LLM(memory="512MiB", max_sequences=batch, prefix_cache=False) as llm:
            rng, vocab = random.Random(spec["seed"]), llm.engine.parts.config.vocab_size
            prompts = [[rng.randrange(vocab) for _ in range(spec["prompt_tokens"])] for _ in range(batch)]
            sampling = SamplingParams(max_tokens=spec["new_tokens"], temperature=0.0, ignore_eos=True)
            with ThreadPoolExecutor(batch) as clients:  # each waits for the engine's thread: all come in one gap
                for done in list(clients.map(lambda ids: llm.engine.generate(ids, sampling), prompts)):
                    done.result()
    pairs = zip(profile.steps, profile.plans, strict=True)
    return [step for step, plan in pairs if [row.kind for row in plan.rows] == ["decode"] * batch][5:]


if __name__ == "__main__":
    print(json.dumps({"steps": measure(json.loads(sys.argv[1]))}))
