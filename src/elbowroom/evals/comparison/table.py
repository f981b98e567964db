"""Comparison: what each method holds and how it answers, as rows and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from elbowroom.evals.comparison.plan import Method
from elbowroom.evals.comparison.quality import Quality, less_is_better

INACTIVE = 0.98
"""A method that holds this share of dense's bytes saves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes and speeds of one method, measured in its process before anything was asked."""

    length: int
    """Tokens of each sequence; the last one is not stored yet."""
    num_contexts: int
    kv_bytes: int
    """Pages of the KV store that hold strips of all contexts, as charged to the ledger."""
    kv_peak_bytes: int
    """Most that the owner ``kv`` was ever charged."""
    peak_over_baseline_bytes: int
    """Peak resident memory of the process minus the baseline, with all contexts held."""
    baseline_bytes: int
    read_bytes_per_token: int | None
    """Strips that one decoded token reads in all layers, whole ones; None: the store did not say."""
    prefill_tokens_per_s: float
    """Median over the contexts."""
    decode_tokens_per_s: float
    prefill_range: tuple[float, float]
    """Slowest and fastest."""
    decode_range: tuple[float, float]
    foreign_cpu_share: float
    """Share of the machine's CPU time that others took while speeds were measured."""

    @property
    def context_bytes(self) -> float:
        """Bytes of one context."""
        return self.kv_bytes / self.num_contexts

    def to_json(self) -> dict[str, object]:
        """Return plain numbers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method: what it holds and how it answers, or why there is nothing to show."""

    method: Method
    footprint: Footprint | None = None
    qualities: Mapping[str, Quality] = field(default_factory=dict)
    """By task."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a task has no quality."""
    error: str | None = None
    """Why the method has nothing."""

    def to_json(self, dense_bytes: float) -> dict[str, object]:
        """Return plain values; ``dense_bytes`` are those of a dense context."""
        head: dict[str, object] = {"method": self.method.label, "kv": self.method.kv, "error": self.error}
        if self.footprint is None:
            return head
        share = ratio(self.footprint, dense_bytes)
        return (
            head
            | self.footprint.to_json()
            | {"context_bytes": self.footprint.context_bytes, "kv_ratio": share, "inactive": self.inactive(dense_bytes)}
            | {"tasks": {task: each.to_json() for task, each in self.qualities.items()}}
            | {"failures": dict(self.failures)}
        )

    def inactive(self, dense_bytes: float) -> bool:
        """Return whether a method other than the control holds as much as dense does."""
        return (
            self.footprint is not None and not self.method.is_dense and ratio(self.footprint, dense_bytes) >= INACTIVE
        )


def ratio(footprint: Footprint, dense_bytes: float) -> float:
    """Return the share of dense's bytes."""
    return footprint.context_bytes / dense_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison; the first row is the dense control."""

    rows: tuple[MethodRow, ...]
    tasks: tuple[str, ...]
    weak: Mapping[str, str]
    """Tasks without a comparison, and why."""

    @property
    def dense_bytes(self) -> float:
        """Bytes of a dense context."""
        footprint = self.rows[0].footprint
        assert footprint is not None  # without the control there is no comparison
        return footprint.context_bytes

    @property
    def compared(self) -> tuple[str, ...]:
        """Tasks with a comparison."""
        return tuple(task for task in self.tasks if task not in self.weak)

    def to_json(self) -> dict[str, object]:
        """Return tasks and methods as plain values."""
        tasks = {
            task: {
                "compared": task not in self.weak,
                "reason": self.weak.get(task),
                "less_is_better": less_is_better(task),
            }
            for task in self.tasks
        }
        return {"tasks": tasks, "methods": [row.to_json(self.dense_bytes) for row in self.rows]}
