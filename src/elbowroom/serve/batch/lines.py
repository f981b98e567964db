"""Lines of batch files, as the OpenAI API defines them, in and out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import pydantic_core
from pydantic import Field

from elbowroom.errors import ElbowroomError, RequestError
from elbowroom.serve.body import check_values
from elbowroom.serve.call import Call
from elbowroom.serve.chat import chat_call
from elbowroom.serve.completions import completion_call
from elbowroom.serve.context import ServerContext
from elbowroom.serve.errors import InvalidField, error_object
from elbowroom.serve.reply import Reply
from elbowroom.serve.requests import ChatRequest, CompletionRequest, GenerationRequest, Schema

_ROUTES: dict[str, tuple[type[GenerationRequest], Callable[[ServerContext, Any], Call]]] = {
    "/v1/chat/completions": (ChatRequest, chat_call),
    "/v1/completions": (CompletionRequest, completion_call),
}


_NOT_HERE = {
    "priority": (
        "lines are answered in the order that costs least",
        "leave it out, or make urgent lines a batch of their own",
    ),
    "deadline_s": ("a batch has no deadlines", "leave it out"),
    "admission": ("all lines are admitted by one policy", "leave it out, and choose the policy by --admission"),
}
"""Fields that servers may allow, and why no line can have them."""


class InvalidLine(RequestError):
    """A line is no request: there is no HTTP answer that it could get."""

    code = "invalid_line"


class DuplicateId(InvalidLine):
    """An earlier line has the same ``custom_id``."""

    code = "duplicate_custom_id"


class UnknownUrl(InvalidLine):
    """No such route can be used in a batch."""

    code = "invalid_url"


class BatchLine(Schema):
    """One request of a batch."""

    custom_id: Annotated[str, Field(min_length=1)]
    method: str = "POST"
    url: str
    body: dict[str, Any]


def parse_line(data: bytes | None, most_bytes: int) -> BatchLine:
    """Return a line of the input; None stands for one that is too long to be read.

    Raises:
        InvalidLine: it is no request.
    """
    if data is None:
        raise InvalidLine(f"the line exceeds {most_bytes} bytes", "send fewer or shorter prompts in one request")
    try:
        values = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as reason:
        raise InvalidLine(f"the line is not valid JSON: {reason}") from None
    if not isinstance(values, dict):
        raise InvalidLine("the line must be a JSON object")
    try:
        return check_values(values, BatchLine)
    except InvalidField as reason:
        raise InvalidLine(reason.message, reason.hint) from None


def custom_id(data: bytes | None) -> str | None:
    """Return the id that a line gives itself, however broken the rest is."""
    try:
        values = pydantic_core.from_json(data or b"")
    except ValueError:
        return None
    found = values.get("custom_id") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def call_of(context: ServerContext, line: BatchLine) -> Call:
    """Return what a line asks for.

    Raises:
        InvalidLine: no such route can be used in a batch.
        RequestError: its body is refused, as it would be over HTTP.
    """
    if line.method != "POST" or line.url not in _ROUTES:
        raise UnknownUrl(f"{line.method} {line.url!r} cannot be used in a batch", f"use POST {' or '.join(_ROUTES)}")
    schema, make = _ROUTES[line.url]
    body = check_values(line.body, schema)
    if body.stream:
        raise InvalidField("stream", "answers of a batch cannot be streamed", "leave it out")
    for field, (reason, hint) in _NOT_HERE.items():
        if getattr(body, field):
            raise InvalidField(field, reason, hint)
    return make(context, body)


def answer_line(line_id: str, custom: str, reply: Reply) -> bytes:
    """Return the line of an answer."""
    return _response(line_id, custom, 200, reply.full().json_bytes())


def error_line(line_id: str, custom: str | None, number: int, error: ElbowroomError) -> bytes:
    """Return the line of a request that was not answered: with the HTTP answer that it would have got, if any."""
    if not isinstance(error, InvalidLine):
        return _response(line_id, custom, error.http_status, json.dumps(error_object(error)).encode())
    message = error.message if error.hint is None else f"{error.message}. Hint: {error.hint}"
    shown = {"code": error.code, "message": message, "line": number}
    fields = {"id": line_id, "custom_id": custom, "response": None, "error": shown}
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _response(line_id: str, custom: str | None, status: int, body: bytes) -> bytes:
    head = json.dumps({"id": line_id, "custom_id": custom}, separators=(",", ":")).encode()[:-1]
    response = b'"status_code":%d,"request_id":"req_%s","body":%s' % (status, uuid.uuid4().hex.encode(), body)
    return head + b',"response":{' + response + b'},"error":null}\n'
