"""``elbowroom bench``: measure against a rival, and say which claims hold."""

from __future__ import annotations


def bench() -> None:
    """Bench."""
