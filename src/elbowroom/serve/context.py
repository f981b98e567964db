"""ServerContext: what all routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass

from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.metrics import ServerMetrics
from elbowroom.serve.open_requests import OpenRequests
from elbowroom.serve.served import ServedModels


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Models, limits, metrics and open requests of one app."""

    models: ServedModels
    limits: ServerLimits
    metrics: ServerMetrics
    requests: OpenRequests
