"""What a part of the matrix gives back, and how a number that was not measured is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from elbowroom.bench.base import BenchOptions, Claim, Row


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and claims of one module."""

    rows: list[Row]
    claims: list[Claim]


Measure = Callable[[BenchOptions], Part]


def unmeasured(name: str, op: Literal[">=", "<="], target: float, unit: str, reason: str) -> Claim:
    """Return a claim without a value."""
    return Claim(id=name, value=None, op=op, target=target, unit=unit, num_runs=0, reason=reason)
