"""Curves over time and groups of bars as SVG, written by hand: a report needs no library and no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 260
LEFT, RIGHT, TOP, BOTTOM = 90, 150, 30, 40
_COLORS = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888"
_STYLE = "text{font:11px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.axis{stroke:#999;fill:none}"
_TICKS = 4


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; each value holds until the next time."""

    label: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Curves:
    """Steps over time, side by side or stacked (then all have the same times)."""

    title: str
    series: Sequence[Series]
    shown: Callable[[int], str]
    """How a value is written."""
    stacked: bool = False

    def svg(self) -> str:
        """Return the picture."""
        return _document(self.title, self._lines())

    def _lines(self) -> Iterator[str]:
        drawn = [each for each in self.series if each.times]
        if not drawn:
            return
        tops, below = [], [0.0] * len(drawn[0].times)
        for each in drawn:
            below = (
                [base + value for base, value in zip(below, each.values, strict=True)] if self.stacked else each.values
            )
            tops.append(below)
        most = max(max(top) for top in tops) or 1.0
        start, end = drawn[0].times[0], max(drawn[0].times[-1], drawn[0].times[0] + 1e-9)
        yield from _axes(
            lambda part: self.shown(round(part * most)), lambda part: f"{start + part * (end - start):,.0f} s"
        )
        for number in reversed(range(len(drawn))):
            xs = [_x((time - start) / (end - start)) for time in drawn[number].times]
            path = _steps(xs, [_y(value / most) for value in tops[number]])
            color = _COLORS[number % len(_COLORS)]
            if self.stacked:
                yield f'<path d="{path}V{_y(0):.1f}H{xs[0]:.1f}Z" fill="{color}"/>'
            else:
                yield f'<path d="{path}" stroke="{color}" fill="none"/>'
        yield from _legend([each.label for each in drawn])


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars, one of each run."""

    title: str
    groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    """(name, (label, value) of each bar); NaN draws nothing."""

    def svg(self) -> str:
        """Return the picture."""
        return _document(self.title, self._lines())

    def _lines(self) -> Iterator[str]:
        values = [value for _, bars in self.groups for _, value in bars if math.isfinite(value)]
        most = max(values, default=0.0) or 1.0
        yield from _axes(lambda part: f"{part * most:.3g}", None)
        for place, (name, bars) in enumerate(self.groups):
            begin, end = place / len(self.groups), (place + 1) / len(self.groups)
            width = 0.8 * (_x(end) - _x(begin)) / len(bars)
            yield _text((_x(begin) + _x(end)) / 2, HEIGHT - BOTTOM + 16, name, "middle")
            for number, (_, value) in enumerate(bars):
                if math.isfinite(value):
                    left, top = _x(begin) + 0.1 * (_x(end) - _x(begin)) + number * width, _y(value / most)
                    color = _COLORS[number % len(_COLORS)]
                    size = f'width="{width:.1f}" height="{_y(0) - top:.1f}"'
                    yield f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{color}"/>'
                    yield _text(left + width / 2, top - 3, f"{value:.3g}", "middle")
        if self.groups:
            yield from _legend([label for label, _ in self.groups[0][1]])


def _document(title: str, lines: Iterator[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"><style>{_STYLE}</style>'
    return "\n".join([head, _text(LEFT, 18, title, "start", "title"), *lines, "</svg>"])


def _axes(shown: Callable[[float], str], under: Callable[[float], str] | None) -> Iterator[str]:
    yield f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    for tick in range(_TICKS + 1):
        part = tick / _TICKS
        yield _text(LEFT - 6, _y(part) + 4, shown(part), "end")
        if under is not None:
            yield _text(_x(part), HEIGHT - BOTTOM + 16, under(part), "middle")


def _legend(labels: Sequence[str]) -> Iterator[str]:
    for number, label in enumerate(labels):
        y = TOP + 16 * number
        yield f'<rect x="{WIDTH - RIGHT + 12}" y="{y}" width="10" height="10" fill="{_COLORS[number % len(_COLORS)]}"/>'
        yield _text(WIDTH - RIGHT + 27, y + 9, label, "start")


def _steps(xs: Sequence[float], ys: Sequence[float]) -> str:
    path = f"M{xs[0]:.1f} {ys[0]:.1f}"
    return path + "".join(f"H{x:.1f}V{y:.1f}" for x, y in zip(xs[1:], ys[1:], strict=True))


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _y(part: float) -> float:
    return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
