"""The seam of executors: whoever turns a StepPlan into sampled tokens, for real or by price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from elbowroom.engine.types import StepPlan, StepResult


class Executor(Protocol):
    """Runs steps in the order they are submitted."""

    def submit(self, plan: StepPlan) -> int:
        """Start a step; return its ticket. The plan is not changed."""

    def collect(self, ticket: int) -> StepResult:
        """Wait for a step and return what it made."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on."""

    num_tokens: int
    """Tokens of the forward pass."""
    num_sampled: int
    """Rows whose logits are needed."""
    context_tokens: int
    """Keys read: the sum over computed tokens of the tokens before them."""

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """Return the shape of ``plan``."""
        context = sum(row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) // 2 for row in plan.rows)
        return cls(plan.num_tokens, sum(row.sample is not None for row in plan.rows), context)


class CostModel(Protocol):
    """Prices steps; the planner brings its own."""

    def step_seconds(self, shape: StepShape) -> float:
        """Return the seconds that a step of this shape takes."""


@dataclass(frozen=True, slots=True)
class LinearCostModel:
    """A step costs a constant, plus something for each token computed, each row sampled and each key read."""

    step_s: float = 1e-3
    token_s: float = 1e-4
    sample_s: float = 1e-5
    context_s: float = 1e-8

    def step_seconds(self, shape: StepShape) -> float:
        """Return the price in seconds."""
        tokens = shape.num_tokens * self.token_s + shape.num_sampled * self.sample_s
        return self.step_s + tokens + shape.context_tokens * self.context_s
