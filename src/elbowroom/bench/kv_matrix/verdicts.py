"""Who beats whom at equal bytes: paired differences between a combination and its parts, column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from elbowroom.bench.kv_matrix.columns import COLUMNS, Column
from elbowroom.bench.kv_matrix.compared import Compared
from elbowroom.bench.kv_matrix.plans import SAME_BYTES, Point
from elbowroom.evals.stats import paired_difference

Verdict = Literal["better", "worse", "equal"]


@dataclass(frozen=True, slots=True)
class Duel:
    """A combination against one of its parts at a budget."""

    combination: Point
    part: Point
    share: float
    differences: dict[str, tuple[float, float, float]]
    """By column: how much better the combination is, with the ends of its interval."""

    def verdict(self, column: str) -> Verdict:
        """Return what the interval of a column says."""
        _, low, high = self.differences[column]
        return "better" if low > 0 else "worse" if high < 0 else "equal"

    @property
    def wins(self) -> bool:
        """Whether the combination is surely better somewhere and surely worse nowhere."""
        verdicts = {self.verdict(column) for column in self.differences}
        return "better" in verdicts and "worse" not in verdicts

    def row(self) -> dict[str, object]:
        """Return plain values."""
        cells = {
            name: {"better_by": mean, "interval": [low, high], "verdict": self.verdict(name)}
            for name, (mean, low, high) in self.differences.items()
        }
        about = {"combination": self.combination.plan.name, "kv": self.combination.text, "part": self.part.text}
        return about | {"share": self.share, "wins": self.wins, **cells}


def fits(point: Point, share: float, compared: Compared) -> bool:
    """Return whether a plan belongs to a budget: it was made for it, or it has one size and that is no larger."""
    if point.share is not None:
        return point.share == share
    ratio = compared.rows[point.text].get("kv_ratio")
    return ratio is not None and ratio <= SAME_BYTES * share


def duels(points: Sequence[Point], shares: Sequence[float], compared: Compared) -> Iterator[Duel]:
    """Yield every combination against each of its parts that fits the budget."""
    for share in shares:
        here = [point for point in points if fits(point, share, compared)]
        for combination in here:
            for part in here:
                if part.plan.name in combination.plan.parts:
                    yield Duel(combination, part, share, _differences(combination, part, compared))


def _differences(one: Point, other: Point, compared: Compared) -> dict[str, tuple[float, float, float]]:
    found = {}
    for column in COLUMNS:
        first, second = column.scores(compared, one.text), column.scores(compared, other.text)
        if first and second:
            better, worse = (second, first) if column.less_is_better else (first, second)
            paired = paired_difference(better, worse)
            found[column.name] = (paired.difference, *paired.interval)
    return found


def best_point(points: Sequence[Point], column: Column, share: float, compared: Compared) -> tuple[Point, float] | None:
    """Return the plan with the best score among those that fit a budget, of equal ones the one with fewest bytes."""
    scored = []
    for point in points:
        score = column.cell(compared, point.text)["score"]
        if fits(point, share, compared) and isinstance(score, float):
            badness = score if column.less_is_better else -score
            scored.append((badness, compared.rows[point.text]["context_bytes"], point, score))
    if not scored:
        return None
    *_, point, score = min(scored, key=lambda each: each[:2])
    return point, score
