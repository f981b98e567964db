"""The description of the API at /openapi.json: bodies that routes parse themselves, answers, and ranges of fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from elbowroom.engine.admission import ADMISSIONS
from elbowroom.engine.sampling_params import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, RANGES
from elbowroom.serve.callers import MOST_PRIORITY
from elbowroom.serve.context import ServerContext
from elbowroom.serve.requests import RENAMED

_BOUNDS: dict[str, dict[str, Any]] = {
    RENAMED.get(name, name): {"minimum": low, "maximum": high} for name, (low, high) in RANGES.items()
}
_BOUNDS |= {
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_logprobs": {"minimum": 0, "maximum": MAX_TOP_LOGPROBS},
    "stop": {"minLength": 1, "maxItems": MAX_STOP_STRINGS, "items": {"minLength": 1}},
    "logit_bias": {
        "propertyNames": {"pattern": "^[0-9]{1,19}$"},
        "additionalProperties": {"minimum": -100, "maximum": 100},
    },
}
_BOUNDS |= {  # what is known but not built
    "suffix": {"maxLength": 0},
    "tools": {"maxItems": 0},
    "functions": {"maxItems": 0},
    "tool_choice": {"enum": [None, "none", "auto"]},
    "modalities": {"maxItems": 1, "items": {"const": "text"}},
    "response_format": {"properties": {"type": {"const": "text"}}},
}
"""By field; in JSON Schema each of these bounds one kind of value only, so null stays allowed."""


def body_schema(schema: type[BaseModel], context: ServerContext) -> dict[str, Any]:
    """Return the OpenAPI description of a body that the route parses itself: what this server takes."""
    made, bounds = _described(schema, "validation"), _BOUNDS | _bounds(context)
    for name, described in made["properties"].items():
        described.update(bounds.get(name, {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": made}}}}


def answer_schema(schema: type[BaseModel], is_streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a successful answer; the events of a stream are not described."""
    content: dict[str, Any] = {"application/json": {"schema": _described(schema, "serialization")}}
    if is_streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": "The answer", "content": content}}


def _bounds(context: ServerContext) -> dict[str, dict[str, Any]]:
    """Return bounds that come from the server's models and limits, by field."""
    models = list(context.models)
    names: list[str | None] = [model.name for model in models]
    most_id = max((model.llm.engine.parts.config.vocab_size for model in models), default=1) - 1
    made: dict[str, dict[str, Any]] = {
        "model": {"enum": [*names, *([None] if len(names) == 1 else [])]},
        "stop_token_ids": {"items": {"minimum": 0, "maximum": most_id}},
    }
    allows, heeds = context.limits, any(model.llm.engine.heeds_deadlines for model in models)
    made["priority"] = (
        {"minimum": -MOST_PRIORITY, "maximum": MOST_PRIORITY - 1} if allows.allow_priority else {"enum": [0, None]}
    )
    made["deadline_s"] = {"exclusiveMinimum": 0} if allows.allow_priority and heeds else {"type": "null"}
    made["admission"] = {"enum": [*ADMISSIONS.names(), None]} if allows.allow_admission else {"type": "null"}
    if not any(model.llm.engine.thinking_marks for model in models):
        made |= {"thinking_token_budget": {"type": "null"}, "answer_reserve": {"enum": [0, None]}}
    return made


def _described(schema: type[BaseModel], mode: Any) -> Any:
    described = schema.model_json_schema(mode=mode)
    return _inlined(described, described.pop("$defs", {}))


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """Return a part of a schema with what it refers to: such references mean nothing in an OpenAPI document."""
    if isinstance(part, list):
        return [_inlined(each, definitions) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(definitions[part["$ref"].removeprefix("#/$defs/")], definitions)
    return {key: _inlined(each, definitions) for key, each in part.items()}
