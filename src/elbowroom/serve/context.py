"""ServerContext: what all routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

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

    def body_schema(self, schema: type[BaseModel]) -> dict[str, Any]:
        """Return the OpenAPI description of a body that the route parses itself."""
        described = schema.model_json_schema()
        made = _inlined(described, described.pop("$defs", {}))
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": made}}}}


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """Return a part of a schema with what it refers to: such references mean nothing in an OpenAPI document."""
    if isinstance(part, list):
        return [_inlined(each, definitions) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(definitions[part["$ref"].removeprefix("#/$defs/")], definitions)
    return {key: _inlined(each, definitions) for key, each in part.items()}
