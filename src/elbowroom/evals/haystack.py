"""Haystacks: lines among which the lines that are asked for are hidden."""

from __future__ import annotations

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise."""
MOST_UNITS = 2**22
"""Lines of a haystack of which there is no end."""


def hide(hay: list[str], needles: list[str], depths: list[float]) -> tuple[str, list[int]]:
    """Return the lines of ``hay`` with ``needles`` between them, and the character offset of each needle.

    Args:
        hay: lines.
        needles: lines to insert.
        depths: share of ``hay`` in front of each needle.
    """
    order = sorted(range(len(needles)), key=lambda index: depths[index])
    lines: list[str] = []
    starts = [0] * len(needles)
    length = done = 0
    for index in order:
        stop = round(depths[index] * len(hay))
        lines += hay[done:stop]
        length += sum(len(line) + 1 for line in hay[done:stop])
        starts[index], done = length, stop
        lines.append(needles[index])
        length += len(needles[index]) + 1
    return "\n".join(lines + hay[done:]), starts
