"""Forecast: what a job will take, from a run of the real scheduler over priced steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.executors.base import CostModel
from elbowroom.engine.executors.simulated import SimExecutor
from elbowroom.engine.offline.plan import JobPlan
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler
from elbowroom.engine.types import Request, Stem

MOST_STEPS = 20_000
"""Steps that are simulated; what is left then is taken to go on as it went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Tokens, bytes and seconds of a job; answers are taken to become as long as they may."""

    num_prompts: int
    prompt_tokens: int
    """Of all samples."""
    least_tokens: int
    """Those that would be computed if each shared token were computed once: the optimum."""
    computed_tokens: int
    """Those that will be computed in this order and memory."""
    new_tokens: int
    """Generated at most."""
    peak_kv_bytes: int
    kv_bytes: int
    """That the KV cache may hold."""
    seconds: float
    is_extrapolated: bool
    """Whether only the beginning was simulated."""

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that need not be computed."""
        return 1.0 - self.computed_tokens / max(self.prompt_tokens, 1)

    @property
    def best_share(self) -> float:
        """The most that sharing could save."""
        return 1.0 - self.least_tokens / max(self.prompt_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers."""
        return asdict(self) | {"saved_share": self.saved_share, "best_share": self.best_share}


def forecast(
    plan: JobPlan,
    new_tokens: Sequence[int],
    scheduler: Scheduler,
    cost: CostModel,
    num_waiting: int,
    kv_plans: Sequence[int] | None = None,
    most_steps: int = MOST_STEPS,
) -> Forecast:
    """Simulate a job.

    Args:
        plan: what runs, in which order.
        new_tokens: tokens that each prompt generates, by its number.
        scheduler: a fresh one with the limits and prices of the engine.
        cost: price of a step.
        num_waiting: requests that are kept waiting for the scheduler to choose from.
        kv_plans: number of the KV plan of each prompt, by its number; None: the first.
        most_steps: steps after which the rest is extrapolated.
    """
    tree, feed = plan.tree, simulated_requests(plan, new_tokens, kv_plans)
    executor, account = SimExecutor(cost), scheduler.account
    seconds, computed, peak, steps = 0.0, 0, 0, 0
    stats = scheduler.stats()
    while steps < most_steps:
        for request in islice(feed, max(num_waiting - stats.num_waiting, 0)):
            scheduler.add(request)
        if not scheduler.has_work():
            break
        step = scheduler.schedule(seconds)
        peak = max(peak, account.used_bytes + account.cached_bytes + account.transient_bytes)
        result = executor.collect(executor.submit(step))
        computed += sum(row.num_tokens for row in step.rows if row.kind == "chunk")
        seconds += result.duration_s
        scheduler.update(result)
        stats, steps = scheduler.stats(), steps + 1
    total = sum(new_tokens[prompt] * tree.weight.get(prompt, 1) for prompt in tree.ends)
    is_cut = scheduler.has_work()
    if is_cut:
        scale = (plan.planned_tokens + total) / max(computed + stats.generated_tokens, 1)
        seconds, computed = seconds * max(scale, 1.0), max(plan.planned_tokens, computed)
    return Forecast(
        num_prompts=len(tree.ends),
        prompt_tokens=tree.total_tokens,
        least_tokens=tree.least_tokens,
        computed_tokens=computed,
        new_tokens=total,
        peak_kv_bytes=peak,
        kv_bytes=account.capacity_bytes,
        seconds=seconds,
        is_extrapolated=is_cut,
    )


def simulated_requests(
    plan: JobPlan, new_tokens: Sequence[int], kv_plans: Sequence[int] | None = None
) -> Iterator[Request]:
    """Yield a job's requests as simulations take them: lengths, and keys in place of tokens."""
    for prompt, stems in plan.feed():
        yield _request(plan, prompt, stems, new_tokens[prompt], kv_plans[prompt] if kv_plans else 0)


def _request(plan: JobPlan, prompt: int, stems: tuple[Stem, ...] | None, new_tokens: int, kv_plan: int) -> Request:
    samples = plan.tree.weight.get(prompt, 1)
    return Request(
        id=prompt,
        prompt_token_ids=(0,) * plan.prompts.length(prompt),
        sampling=SamplingParams(max_tokens=new_tokens, n=samples, temperature=0.0, ignore_eos=True),
        block_keys=block_keys(plan, prompt),
        stems=stems,
        plan=kv_plan,
    )


def block_keys(plan: JobPlan, prompt: int) -> tuple[bytes, ...]:
    """Return keys of a prompt's full blocks, equal where prompts are equal up to the block's end."""
    tree, keys = plan.tree, list[bytes]()
    for node in tree.path(prompt):
        while (len(keys) + 1) * STRIP_TOKENS <= tree.depth[node]:
            keys.append(f"{node}/{len(keys)}".encode())
    return tuple(keys)
