"""Every error as the OpenAI API writes it: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from elbowroom.errors import ElbowroomError, RequestError

CLIENT_CLOSED_REQUEST = 499
_LOG = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class InvalidField(RequestError):
    """One field of a request is wrong; ``param`` names it."""

    def __init__(self, param: str, message: str, hint: str | None = None) -> None:
        super().__init__(f"{param}: {message}", hint)
        self.param = param


class BodyTooLarge(RequestError):
    """The request body exceeds the server's limit."""

    http_status = 413
    code = "request_body_too_large"


class BodyTooSlow(RequestError):
    """The request body did not arrive in time."""

    http_status = 408
    code = "request_body_timeout"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    http_status = 401
    code = "invalid_api_key"


def error_object(error: Exception) -> dict[str, dict[str, str | None]]:
    """Return the body that describes ``error``; what is no ElbowroomError shows only its kind."""
    if not isinstance(error, ElbowroomError):
        return _body(500, f"internal error: {type(error).__name__}", "internal_error", None)
    message = error.message if error.hint is None else f"{error.message}. Hint: {error.hint}"
    return _body(error.http_status, message, error.code, getattr(error, "param", None))


def error_json(error: Exception) -> bytes:
    """Return ``error_object`` as ASCII JSON on one line."""
    return json.dumps(error_object(error)).encode()


def error_response(error: Exception) -> Response:
    """Return the response that describes ``error``."""
    status = error.http_status if isinstance(error, ElbowroomError) else 500
    headers = {}
    if isinstance(error, ElbowroomError) and status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    return _respond(status, error_json(error), headers)


_FIELDS = {
    "message": {"type": "string"},
    "type": {"type": "string"},
    "param": {"type": ["string", "null"]},
    "code": {"type": "string"},
}
_SCHEMA = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": _FIELDS, "required": list(_FIELDS)}},
    "required": ["error"],
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _SCHEMA}}}
    for status, text in (("4XX", "The request is refused"), ("5XX", "The server cannot answer it"))
}
"""OpenAPI description of every way out that is no success."""


def install_error_handlers(app: FastAPI) -> None:
    """Make every way out of ``app`` that is no success speak the OpenAI format."""

    def on_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, ElbowroomError):
            _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(error)

    def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        body = _body(error.status_code, message, _http_code(error.status_code), None)
        return _respond(error.status_code, json.dumps(body).encode(), dict(error.headers or {}))

    def on_disconnect(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(ElbowroomError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_error)


def _http_code(status: int) -> str:
    return {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")


def _body(status: int, message: str, code: str, param: str | None) -> dict[str, dict[str, str | None]]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _respond(status: int, body: bytes, headers: dict[str, str]) -> Response:
    return Response(body, status, headers, media_type="application/json")
