"""Everything that any command imports, in one place: the baseline of ``doctor --baseline`` and of each run is equal."""

from __future__ import annotations

import importlib

MODULES = (
    "rich.console",
    "rich.progress",
    "rich.table",
    "elbowroom.engine.llm",
    "elbowroom.serve",
)


def preload() -> None:
    """Import what ``run``, ``serve`` and ``eval`` import before they load a model."""
    for name in MODULES:
        importlib.import_module(name)
