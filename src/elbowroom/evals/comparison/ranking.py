"""Rankings at equal resident bytes, or at equal quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elbowroom.evals.comparison.quality import Quality, less_is_better
from elbowroom.evals.comparison.table import Comparison, MethodRow

Equal = Literal["bytes", "quality"]
SAME_BYTES = 1.05
"""Methods of a group hold at most this many times what its smallest one holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """One list, the best first."""

    task: str
    methods: tuple[str, ...]
    lowest_bytes: float
    """Of a context, among the methods."""
    highest_bytes: float
    dropped: tuple[str, ...] = ()
    """At equal quality: methods that are worse than dense."""

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "task": self.task,
            "methods": list(self.methods),
            "lowest_bytes": self.lowest_bytes,
            "highest_bytes": self.highest_bytes,
            "dropped": list(self.dropped),
        }


def rank(comparison: Comparison, equal: Equal) -> list[Ranking]:
    """Return the rankings of every task that allows a comparison."""
    ranked: list[Ranking] = []
    for task in comparison.compared:
        rows = sorted((row for row in comparison.rows if task in row.qualities), key=_bytes)
        if equal == "quality":
            kept = [row for row in rows if not is_worse(task, row.qualities[task])]
            ranked.append(_ranking(task, kept, [row for row in rows if row not in kept]))
            continue
        for group in _groups(rows):
            ranked.append(_ranking(task, sorted(group, key=lambda row: _badness(task, row))))  # noqa: PERF401  one a group
    return ranked


def is_worse(task: str, found: Quality) -> bool:
    """Return whether the whole interval of the paired difference lies on the bad side of 0."""
    if found.difference_interval is None:
        return False
    low, high = found.difference_interval
    return low > 0 if less_is_better(task) else high < 0


def _groups(rows: Sequence[MethodRow]) -> list[list[MethodRow]]:
    """Cut rows, ascending by bytes, into groups of the same bytes."""
    groups: list[list[MethodRow]] = []
    for row in rows:
        if groups and _bytes(row) <= SAME_BYTES * _bytes(groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _ranking(task: str, rows: Sequence[MethodRow], dropped: Sequence[MethodRow] = ()) -> Ranking:
    sizes = [_bytes(row) for row in rows]
    return Ranking(
        task=task,
        methods=tuple(row.method.label for row in rows),
        lowest_bytes=min(sizes, default=0.0),
        highest_bytes=max(sizes, default=0.0),
        dropped=tuple(row.method.label for row in dropped),
    )


def _badness(task: str, row: MethodRow) -> float:
    score = row.qualities[task].score
    return score if less_is_better(task) else -score


def _bytes(row: MethodRow) -> float:
    return 0.0 if row.footprint is None else row.footprint.context_bytes
