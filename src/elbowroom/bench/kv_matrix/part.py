"""What a part of the matrix gives back, what it claims, and what becomes of its claims when it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.errors import ElbowroomError


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and claims of one module."""

    rows: list[Row]
    claims: list[Claim]


Measure = Callable[[BenchOptions], Part]


def claimed(name: str, op: Literal[">=", "<="], target: float, unit: str) -> Claim:
    """Return a claim without a value: what a module is going to measure."""
    return Claim(id=name, value=None, op=op, target=target, unit=unit, num_runs=0)


def broken(claims: tuple[Claim, ...], error: Exception) -> Part:
    """Return the part of a module whose measurement raised ``error``: no rows, and ``claims`` that say why."""
    message = error.message if isinstance(error, ElbowroomError) else str(error)
    return Part([], [replace(claim, reason=f"failed: {type(error).__name__}: {message}") for claim in claims])
