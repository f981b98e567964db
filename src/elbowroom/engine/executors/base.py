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
    num_decode_rows: int = 0
    """Rows that compute the last token sampled for their slot."""
    kv_tokens: int = 0
    """Tokens that the sequences of the step have stored behind it."""

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """Return the shape of ``plan``."""
        tokens = context = decodes = stored = sampled = 0
        for row in plan.rows:
            count = row.num_tokens
            tokens += count
            context += count * row.start + count * (count + 1) // 2
            stored += row.start + count
            decodes += row.kind == "decode"
            sampled += row.sample is not None
        return cls(tokens, sampled, context, decodes, stored)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prompts, those that are computed again included."""
        return self.num_tokens - self.num_decode_rows

    def repeated(self) -> StepShape:
        """Return the shape of the same rows one token further; all of them are decodes."""
        return StepShape(
            self.num_tokens,
            self.num_sampled,
            self.context_tokens + self.num_tokens,
            self.num_decode_rows,
            self.kv_tokens + self.num_tokens,
        )


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


@dataclass(frozen=True, slots=True)
class ServingCostModel:
    """A step costs a constant, plus something for each prompt token, each decoding row and each token stored.

    The defaults are those of a server GPU with a model of about 8 billion parameters, as serving studies simulate it.
    """

    step_s: float = 20e-3
    prefill_token_s: float = 0.12e-3
    decode_row_s: float = 0.04e-3
    kv_token_s: float = 0.2e-6

    def step_seconds(self, shape: StepShape) -> float:
        """Return the price in seconds."""
        return (
            self.step_s
            + (shape.num_tokens - shape.num_decode_rows) * self.prefill_token_s
            + shape.num_decode_rows * self.decode_row_s
            + shape.kv_tokens * self.kv_token_s
        )
