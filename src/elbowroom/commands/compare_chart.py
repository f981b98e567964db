"""The picture of a comparison: quality against resident bytes, one panel a task; SVG, and PNG with matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from elbowroom.evals.comparison.table import Comparison

NAME = "quality-bytes"
NO_PNG = f"no {NAME}.png: matplotlib is not installed; pip install 'elbowroom[plot]' and repeat the command"


@dataclass(frozen=True, slots=True)
class Point:
    """One method in a panel."""

    label: str
    num_bytes: float
    """Of one context."""
    score: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One task."""

    title: str
    axis: str
    """What the score is."""
    points: tuple[Point, ...]
    """Ascending by bytes."""
    reason: str = ""
    """Why there are none."""


def panels(comparison: Comparison) -> list[Panel]:
    """Return a panel for each task; one that is not compared has no points."""
    from elbowroom.evals.comparison.quality import less_is_better

    made = []
    for task in comparison.tasks:
        points = [
            Point(row.method.label, row.footprint.context_bytes, found.score, *found.interval)
            for row in comparison.rows
            if row.footprint is not None and (found := row.qualities.get(task)) is not None
        ]
        axis = "bits per byte (less is better)" if less_is_better(task) else "score"
        ordered = tuple(sorted(points, key=lambda point: point.num_bytes))
        made.append(Panel(task, axis, ordered, comparison.weak.get(task, "")))
    return made


def draw(comparison: Comparison, directory: Path) -> tuple[list[Path], str | None]:
    """Write the pictures to ``directory``; return their paths, and what to say when there is no PNG."""
    from elbowroom.commands.compare_svg import svg

    made = panels(comparison)
    paths = [directory / f"{NAME}.svg"]
    paths[0].write_text(svg(made), encoding="utf-8")
    try:
        from elbowroom.commands.compare_png import write_png
    except ImportError:
        return paths, NO_PNG
    paths.append(directory / f"{NAME}.png")
    write_png(made, paths[1])
    return paths, None
