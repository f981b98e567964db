"""ServerContext: what all routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.metrics import ServerMetrics
from elbowroom.serve.served import ServedModels


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Models, limits and metrics of one app."""

    models: ServedModels
    limits: ServerLimits
    metrics: ServerMetrics

    def body_schema(self, schema: type[BaseModel]) -> dict[str, Any]:
        """Return the OpenAPI description of a body that the route parses itself."""
        return {"requestBody": {"content": {"application/json": {"schema": schema.model_json_schema()}}}}
