"""SimExecutor: prices steps instead of computing them, so that hours of a trace replay in seconds."""

from __future__ import annotations

from dataclasses import replace

from elbowroom.engine.executors.base import CostModel, StepShape
from elbowroom.engine.executors.simulated_transfers import SimTransfers
from elbowroom.engine.types import Row, SampledToken, StepPlan, StepResult


class SimExecutor:
    """Answers every sampled row with one fixed token after the time that the cost model names.

    An answer ends where its trace says so (``Request.num_output_tokens``), by ``end_token_id``, else at ``max_tokens``.

    Args:
        cost: price of a step.
        token_id: the token that every row "samples".
        end_token_id: the one that ends an answer: one of the scheduler's ``eos_token_ids``.
        transfers: prices of saving and loading, where plans may ask for that.
    """

    def __init__(
        self, cost: CostModel, token_id: int = 0, end_token_id: int = 1, transfers: SimTransfers | None = None
    ) -> None:
        self._cost, self._token, self._end = cost, SampledToken(token_id), SampledToken(end_token_id)
        self._transfers = transfers
        self._results: dict[int, StepResult] = {}
        self._next_ticket = 0
        self.stop_after_s: float | None = None
        """Do not repeat a step once this much time has passed in it (the next arrival, set by the driver)."""

    def submit(self, plan: StepPlan) -> int:
        """Price the step and as many repetitions as the plan, ``stop_after_s`` and transfers that end allow."""
        rows, stop_after_s, total, ends = plan.rows, self.stop_after_s, 0.0, list[float]()
        if self._transfers is not None:
            rows, total = self._transfers.begin(plan)
            stop_after_s = _earliest(stop_after_s, self._transfers.next_end_s(), total)
        shape = StepShape.of(plan if rows is plan.rows else replace(plan, rows=rows))
        most = min([plan.valid_for_steps, *(left for row in rows if (left := _left(row)) is not None)])
        latest = float("inf") if stop_after_s is None else stop_after_s
        while rows and len(ends) < most and (not ends or total < latest):
            total += self._cost.step_seconds(shape)
            ends.append(total)
            shape = shape.repeated()
        if not rows and plan.waits and stop_after_s is not None:
            total = max(total, stop_after_s)
        tokens = {row.slot: self._answer(row, len(ends)) for row in rows if row.sample is not None}
        moved = () if self._transfers is None else self._transfers.end(total)
        self._next_ticket += 1
        made = tuple(ends) or (total,)  # changes of stored sequences alone cost next to nothing
        self._results[self._next_ticket] = StepResult(tokens, len(made), total, moved=moved, step_ends_s=made)
        return self._next_ticket

    def _answer(self, row: Row, steps: int) -> list[SampledToken]:
        """Return the tokens of a row that is repeated ``steps`` times; the last may be the end of its answer."""
        made = [self._token] * steps
        if _left(row) == steps:
            made[-1] = self._end
        return made

    def collect(self, ticket: int) -> StepResult:
        """Return the priced step."""
        return self._results.pop(ticket)


def _earliest(stop_s: float | None, end_s: float | None, passed_s: float) -> float | None:
    """Return the earlier of a time in a step and of a transfer's end, which is counted from ``passed_s`` on."""
    if end_s is None:
        return stop_s
    return passed_s + end_s if stop_s is None else min(stop_s, passed_s + end_s)


def _left(row: Row) -> int | None:
    """Return the tokens that are left of a row's answer, this one included; None: nobody knows, or none is sampled."""
    spec = row.sample
    if spec is None or spec.num_output_tokens is None:
        return None
    return max(spec.num_output_tokens - (row.start + row.num_tokens - spec.num_prompt_tokens), 1)
