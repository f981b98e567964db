"""SimExecutor: prices steps instead of computing them, so that hours of a trace replay in seconds."""

from __future__ import annotations

from elbowroom.engine.executors.base import CostModel, StepShape
from elbowroom.engine.types import SampledToken, StepPlan, StepResult


class SimExecutor:
    """Answers every sampled row with one fixed token after the time that the cost model names.

    Requests should set ``ignore_eos`` and ``max_tokens``: output lengths come from the trace.

    Args:
        cost: price of a step.
        token_id: the token that every row "samples".
    """

    def __init__(self, cost: CostModel, token_id: int = 0) -> None:
        self._cost, self._token = cost, SampledToken(token_id)
        self._results: dict[int, StepResult] = {}
        self._next_ticket = 0
        self.stop_after_s: float | None = None
        """Do not repeat a step once this much time has passed in it (the next arrival, set by the driver)."""

    def submit(self, plan: StepPlan) -> int:
        """Price the step and as many repetitions as the plan and ``stop_after_s`` allow."""
        shape = StepShape.of(plan)
        total, steps = 0.0, 0 if plan.rows else 1  # changes of stored sequences alone cost next to nothing
        while (
            plan.rows
            and steps < plan.valid_for_steps
            and (steps == 0 or self.stop_after_s is None or total < self.stop_after_s)
        ):
            total += self._cost.step_seconds(shape)
            steps += 1
            shape = StepShape(shape.num_tokens, shape.num_sampled, shape.context_tokens + shape.num_tokens)
        tokens = {row.slot: [self._token] * steps for row in plan.rows if row.sample is not None}
        self._next_ticket += 1
        self._results[self._next_ticket] = StepResult(tokens, steps, total)
        return self._next_ticket

    def collect(self, ticket: int) -> StepResult:
        """Return the priced step."""
        return self._results.pop(ticket)
