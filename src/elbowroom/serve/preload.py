"""Everything that any command imports, in one place: what ``serve`` and ``doctor --baseline`` hold without a model."""

from __future__ import annotations

import importlib

MODULES = (
    "rich.console",
    "rich.progress",
    "rich.table",
    "elbowroom.engine.llm",
    "elbowroom.models.chat_sandbox",
    "elbowroom.serve",
)


def preload() -> None:
    """Import it all, so that nothing is imported after a model was loaded.

    ``run`` and ``eval`` do not call this: they import less than the server, and start sooner.
    """
    for name in MODULES:
        importlib.import_module(name)
