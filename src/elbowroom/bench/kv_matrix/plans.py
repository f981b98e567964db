"""The plans of the matrix, one table, and how many tokens of a prompt a plan may keep to hold so many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elbowroom.bench.footprint import NEW_TOKENS
from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv.plan import KVPlan

SHARES = (1 / 4, 1 / 8)
"""Budgets, as shares of what bfloat16 holds; each more takes the matrix seven more plans to measure."""
SAME_BYTES = 1.1
"""A plan of one size belongs to a budget if it holds at most this many times its bytes."""
FILLED = 0.7
"""A budget is only for a plan that fills so much of it."""
_STEP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlan:
    """One way to keep keys and values."""

    name: str
    text: str
    """As in ``--kv``; where it says ``{tokens}``, tokens are chosen for each budget."""
    parts: tuple[str, ...] = ()
    """Names of the plans that it combines; it must beat them."""
    default: bool = False
    """Whether a combination is one that we recommend: it must beat its parts at equal bytes somewhere."""

    @property
    def has_budget(self) -> bool:
        """Whether it can be made to hold so many bytes."""
        return "{tokens}" in self.text


PLANS: tuple[MatrixPlan, ...] = (
    MatrixPlan(name="plain", text="plain"),
    MatrixPlan(name="fp8", text="fp8"),
    MatrixPlan(name="int8", text="int8"),
    MatrixPlan(name="bfp", text="bfp"),
    MatrixPlan(name="kivi 4", text="kivi(4,4,32)"),
    MatrixPlan(name="kivi 2", text="kivi(2,2,64)"),
    MatrixPlan(name="streaming", text="streaming(tokens={tokens})"),
    MatrixPlan(name="snapkv", text="snapkv(tokens={tokens})"),
    MatrixPlan(name="streaming | int8", text="streaming(tokens={tokens}) | int8", parts=("streaming", "int8")),
    MatrixPlan(name="snapkv | int8", text="snapkv(tokens={tokens}) | int8", parts=("snapkv", "int8"), default=True),
    MatrixPlan(name="kvmerger", text="kvmerger(tokens={tokens})"),
    MatrixPlan(name="think", text="think(0.4)"),
    MatrixPlan(name="planes", text="planes"),
    MatrixPlan(name="progressive", text="progressive | planes", parts=("planes",)),
    MatrixPlan(name="think | kivi 4", text="think(0.4) | kivi(4,4,32)", parts=("think", "kivi 4")),
    MatrixPlan(
        name="snapkv | kivi 4", text="snapkv(tokens={tokens}) | kivi(4,4,32)", parts=("snapkv", "kivi 4"), default=True
    ),
    MatrixPlan(name="snapkv | bfp", text="snapkv(tokens={tokens}) | bfp", parts=("snapkv", "bfp"), default=True),
)
"""The first one is dense. A new plan is a new line."""


@dataclass(frozen=True, slots=True)
class Point:
    """A plan of one size."""

    plan: MatrixPlan
    text: str
    share: float | None
    """Budget that it was made for; None: it has one size."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What plans hold of sequences of one length, of one model.

    Args:
        layers: of the model.
        length: tokens of a sequence with those decoded behind its prompt.
    """

    layers: Sequence[LayerSpec]
    length: int

    def held_bytes(self, text: str) -> int:
        """Return the bytes that a sequence holds under a plan, when all but its last token are stored."""
        bound = KVPlan.parse(text).bind(self.layers, "bfloat16")
        return int(bound.curve(self.length - NEW_TOKENS, np.array([self.length - 1])).resident_bytes[0])

    def largest(self, plan: MatrixPlan, num_bytes: float) -> str | None:
        """Return the plan with the most tokens that holds at most ``num_bytes``; None: it cannot hold about so many."""
        for tokens in range(self.length - NEW_TOKENS - 1, 0, -1):
            if tokens % _STEP:
                continue
            text = plan.text.format(tokens=tokens)
            try:
                held = self.held_bytes(text)
            except PlanError:
                return None  # fewer tokens than it always keeps
            if held <= num_bytes:
                return text if held >= FILLED * num_bytes else None
        return None

    def points(self, plans: Sequence[MatrixPlan], shares: Sequence[float]) -> list[Point]:
        """Return every plan in every size that it can have."""
        dense, found = self.held_bytes(PLANS[0].text), []
        for plan in plans:
            if not plan.has_budget:
                found.append(Point(plan, plan.text, None))
                continue
            sized = [(share, self.largest(plan, share * dense)) for share in shares]
            found += [Point(plan, text, share) for share, text in sized if text is not None]
        return found
