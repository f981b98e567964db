"""OpenAI-compatible HTTP server for one or more engines."""

from __future__ import annotations

from elbowroom.serve.app import create_app
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.server import Server, serve

__all__ = ["Server", "ServerLimits", "create_app", "serve"]
