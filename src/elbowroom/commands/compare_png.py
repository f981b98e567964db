"""The picture of a comparison as PNG; importing this needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from elbowroom.commands.compare_chart import Panel

WIDTH, HEIGHT = 4.5, 3.6
"""Of a panel, in inches."""
_DPI = 150


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Draw ``panels`` side by side into ``path``."""
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, panel)
    figure.savefig(path, format="png", dpi=_DPI)


def _panel(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title)
    if not panel.points:
        axes.text(0.5, 0.5, panel.reason, ha="center", va="center", wrap=True, transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.set_xscale("log", base=2)
    axes.set_xlabel("resident KV bytes of a context (KiB)")
    axes.set_ylabel(panel.axis)
    for number, point in enumerate(panel.points):
        at = point.num_bytes / 1024
        errors = [[max(point.score - point.low, 0.0)], [max(point.high - point.score, 0.0)]]
        axes.errorbar([at], [point.score], yerr=errors, fmt="o", capsize=3)
        above = number % 2 == 0
        axes.annotate(point.label, (at, point.score), textcoords="offset points", xytext=(5, 6 if above else -12))
