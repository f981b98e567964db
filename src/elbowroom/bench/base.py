"""What a benchmark gives back: rows that were measured, and claims that the rows hold or break."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from elbowroom.errors import RequestError

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One number with the bound that it is measured against.

    What was not measured (an absent rival included) has value None, does not hold, and says why in ``reason``.
    """

    id: str
    value: float | None
    op: Literal[">=", "<="]
    target: float
    unit: str
    num_runs: int = 1
    low: float | None = None
    """Lowest of the runs, or the lower end of an interval that ``reason`` names."""
    high: float | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value was measured and keeps the bound."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.target if self.op == ">=" else self.value <= self.target

    def to_json(self) -> dict[str, object]:
        """Return the claim as written to results."""
        return {
            "id": self.id,
            "value": self.value,
            "op": self.op,
            "target": self.target,
            "unit": self.unit,
            "holds": self.holds,
            "num_runs": self.num_runs,
            "low": self.low,
            "high": self.high,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Outcome of one benchmark."""

    name: str
    machine: Row
    rows: list[Row]
    claims: list[Claim]
    failures: list[str] = field(default_factory=list)
    """Claims, by part of the benchmark, whose measurement raised an error: their reason says which."""

    def to_json(self) -> dict[str, object]:
        """Return ``{name, machine, rows, claims}``."""
        return {
            "name": self.name,
            "machine": dict(self.machine),
            "rows": [dict(row) for row in self.rows],
            "claims": [claim.to_json() for claim in self.claims],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What ``bench serve`` replays, and how."""

    trace: Path | None = None
    """None: a small load that is made."""
    policies: tuple[str, ...] = ("greedy", "past_future")
    """Of admission."""
    orders: tuple[str, ...] = ("priority",)
    preemptions: tuple[str, ...] = ("recompute",)
    swap: Path | None = None
    """Where real runs save sequences, and whose costs simulated ones are given."""
    simulate: bool = False
    """On the simulated executor alone."""
    memory: str | None = None
    """Of the KV cache; None: derived from the trace."""
    ttft_s: float = 10.0
    gap_s: float = 1.5
    max_tokens: int | None = None
    """Limit that clients send; None: 4,096, and 400 where the load is made."""
    num_requests: int | None = None
    rate: float | None = None
    """Requests a second, to which arrival times are scaled; None: as in the trace."""
    report: Path | None = None
    """HTML file to write."""

    def check(self) -> None:
        """Refuse what cannot be meant, before anything runs.

        Raises:
            RequestError: names the option.
        """
        for option, value in (("--rate", self.rate), ("--ttft", self.ttft_s), ("--gap", self.gap_s)):
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{option} must be a number above 0, not {value:g}", "leave it out for the default")
        if self.swap is not None and not self.swap.is_dir():
            raise RequestError(f"--swap {self.swap} is no directory", "make it first")
        if self.report is not None and not self.report.absolute().parent.is_dir():
            raise RequestError(f"--report {self.report}: there is no folder {self.report.parent}", "make it first")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What every benchmark takes."""

    quick: bool = False
    """A small version that only shows that the benchmark runs; its claims prove nothing."""
    seed: int = 0
    load: LoadOptions | None = None
    """For benchmarks that replay a workload."""


class Benchmark(Protocol):
    """The ``run`` function of a benchmark's module."""

    def __call__(self, options: BenchOptions) -> BenchResult:
        """Measure; progress goes to stderr."""
