"""The picture of a comparison as SVG, written by hand: no library is needed for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from elbowroom.commands.compare_chart import Panel, Point
from elbowroom.units import format_bytes

WIDTH, HEIGHT = 380, 300
"""Of a panel, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 60, 40, 30, 50
_COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
_TICKS = 4
_STYLE = "text{font:11px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.axis{stroke:#999;fill:none}"


def svg(panels: Sequence[Panel]) -> str:
    """Return ``panels`` side by side as one document."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        lines += [f'<g transform="translate({number * WIDTH},0)">', *_panel(panel), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


class _Scale:
    """Maps numbers to pixels, with a margin."""

    def __init__(self, values: Sequence[float], begin: float, end: float, least_span: float) -> None:
        low, high = min(values), max(values)
        margin = max((high - low) * 0.12, (least_span - (high - low)) / 2)
        self.low, self.high = low - margin, high + margin
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        return [self.low + (self.high - self.low) * number / _TICKS for number in range(_TICKS + 1)]


def _panel(panel: Panel) -> Iterator[str]:
    yield _text(WIDTH / 2, 18, panel.title, "middle", "title")
    if not panel.points:
        yield _text(WIDTH / 2, HEIGHT / 2, panel.reason, "middle")
        return
    x = _Scale([math.log2(point.num_bytes) for point in panel.points], LEFT, WIDTH - RIGHT, least_span=1.0)
    scores = [value for point in panel.points for value in (point.low, point.high)]
    y = _Scale(scores, HEIGHT - BOTTOM, TOP, least_span=0.02)
    yield f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    for tick in x.ticks():
        yield _text(x(tick), HEIGHT - BOTTOM + 16, format_bytes(2**tick), "middle")
    for tick in y.ticks():
        yield _text(LEFT - 6, y(tick) + 4, f"{tick:.3f}", "end")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, f"KV of a context; {panel.axis}", "middle")
    for number, point in enumerate(panel.points):
        yield from _point(point, number, x, y)


def _point(point: Point, number: int, x: _Scale, y: _Scale) -> Iterator[str]:
    at, color = x(math.log2(point.num_bytes)), _COLORS[number % len(_COLORS)]
    low, high = y(point.low), y(point.high)
    ends = f"M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} {high:.1f}h8"
    yield f'<path d="M{at:.1f} {low:.1f}V{high:.1f}{ends}" stroke="{color}"/>'
    yield f'<circle cx="{at:.1f}" cy="{y(point.score):.1f}" r="4" fill="{color}"/>'
    # Neighbours often score the same: their names take turns above and below the point.
    yield _text(at, y(point.score) + (-9 if number % 2 == 0 else 18), point.label, "middle")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
