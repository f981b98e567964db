"""Rounds in which several sides take turns, and what their figures say: medians, and ratios round by round.

A machine's speed drifts (clocks, neighbours, temperature). Sides that are measured one behind the other inherit that
drift; sides that take turns share it. So every round runs each side once, in an order that changes from round to
round, and a ratio is that of two runs of the same round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from elbowroom.bench.base import Claim
from elbowroom.errors import ElbowroomError

Run = Mapping[str, float]
"""Figures of one run."""
Play = Callable[[int], Run]
"""Runs one side; gets the number of the round (below 0: a warm-up), so that all sides of a round get the same load."""
CONFIDENCE = 0.95


@dataclass(slots=True)
class Turns:
    """What every side did in every round, and why a side did nothing."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Side -> why it has no figures; such a side has no runs."""

    def figures(self, side: str, figure: str) -> list[float]:
        """Return one figure of a side, round by round; empty when the side failed."""
        return [run[figure] for run in self.runs.get(side, [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianInterval:
    """A median with the interval between two order statistics around it."""

    median: float
    low: float
    high: float
    coverage: float
    """Chance that the interval holds the true median, were the rounds independent draws of one distribution."""
    num_runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MedianInterval:
        """Return the median of at least one value and the narrowest symmetric interval that covers it with 95 %.

        With five values or fewer no interval does: then it reaches from the lowest to the highest, and ``coverage``
        says what that is worth.
        """
        ranked, count = sorted(values), len(values)
        cut = 0
        while 2 * (cut + 1) < count and _coverage(count, cut + 1) >= CONFIDENCE:
            cut += 1
        return cls(
            median=statistics.median(ranked),
            low=ranked[cut],
            high=ranked[count - 1 - cut],
            coverage=_coverage(count, cut),
            num_runs=count,
        )


def take_turns(sides: Mapping[str, Play], num_rounds: int, num_warmups: int = 1) -> Turns:
    """Run every side once a round and return what the rounds behind the warm-ups gave.

    A side that raises an ElbowroomError is left out from then on; the others go on without it.
    """
    turns = Turns({name: [] for name in sides})
    for number in range(-num_warmups, num_rounds):
        for name in order_of(list(sides), number + num_warmups):
            if name in turns.failures:
                continue
            try:
                run = sides[name](number)
            except ElbowroomError as error:
                turns.failures[name] = one_line(error)
                turns.runs[name] = []
                continue
            if number >= 0:
                turns.runs[name].append(run)
    return turns


def order_of(names: Sequence[str], number: int) -> list[str]:
    """Return who comes when in round ``number``: each place, and with up to three sides each order, equally often.

    Every second round runs backwards (against drift), and each pair of rounds begins with another side.
    """
    pair, backwards = divmod(number, 2)
    shift = pair % len(names) if names else 0
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if backwards else turned


def median_ratio(turns: Turns, ours: str, rival: str, figure: str) -> MedianInterval | None:
    """Return ``ours / rival`` of a figure, round by round; None when one of them has none."""
    pairs = zip(turns.figures(ours, figure), turns.figures(rival, figure), strict=False)
    ratios = [one / other for one, other in pairs]
    return MedianInterval.of(ratios) if ratios else None


def ratio_claim(name: str, turns: Turns, rival: str, figure: str, target: float, unit: str) -> Claim:
    """Return the claim that the side ``ours`` has at least ``target`` times the figure of ``rival``."""
    ratio = median_ratio(turns, "ours", rival, figure)
    if ratio is None:
        missing = [f"{side}: {turns.failures[side]}" for side in ("ours", rival) if side in turns.failures]
        return Claim(
            id=name, value=None, op=">=", target=target, unit=unit, num_runs=0, reason="; ".join(missing) or "no runs"
        )
    return Claim(
        id=name,
        value=ratio.median,
        op=">=",
        target=target,
        unit=unit,
        num_runs=ratio.num_runs,
        low=ratio.low,
        high=ratio.high,
        reason=f"median of the ratios of {ratio.num_runs} rounds; low and high are order statistics that hold the "
        f"true median with {100 * ratio.coverage:.1f} %",
    )


def one_line(error: ElbowroomError) -> str:
    """Return message and hint of an error in one line."""
    return str(error).replace("\nhint: ", ": ").replace("\n", " | ")


def _coverage(count: int, cut: int) -> float:
    """Return the chance that the median lies between the values left when ``cut`` are taken off at either end."""
    outside = sum(math.comb(count, below) for below in range(cut + 1))
    return max(0.0, 1.0 - 2.0 * outside / 2.0**count)
