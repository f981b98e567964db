"""``elbowroom serve``: an OpenAI-compatible server whose models stay inside one memory budget."""

from __future__ import annotations


def serve() -> None:
    """Serve."""
