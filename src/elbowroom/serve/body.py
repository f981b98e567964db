"""Reading requests: bodies with a limit, JSON without NaN, and noticing that a client has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from elbowroom.errors import RequestError
from elbowroom.serve.errors import BodyTooLarge, BodyTooSlow, InvalidField
from elbowroom.serve.limits import ServerLimits

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)


async def parse_body(request: Request, schema: type[B], limits: ServerLimits) -> B:
    """Return the request's JSON body as ``schema``.

    Raises:
        BodyTooLarge: it exceeds ``limits.max_body_bytes``; the rest is not read.
        BodyTooSlow: it did not arrive within ``limits.body_timeout_s``.
        RequestError: it is no JSON object, or a field is missing or has another type.
        ClientDisconnect: the client hung up before its end.
    """
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await read_body(request, limits.max_body_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {limits.body_timeout_s:g} s", "send less, faster") from None
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as reason:
        raise RequestError(f"the body is not valid JSON: {reason}") from None
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return schema.model_validate(values)
    except ValidationError as reason:
        first = reason.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidField(where, first["msg"].removeprefix("Value error, ")) from None


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body; errors as in ``parse_body`` but for time."""
    declared = request.headers.get("content-length", "")
    received = bytearray()
    if not (declared.isdecimal() and int(declared) > max_bytes):
        async for chunk in request.stream():
            received += chunk
            if len(received) > max_bytes:
                break
        else:
            return bytes(received)
    raise BodyTooLarge(f"the request body exceeds {max_bytes} bytes", "send fewer or shorter prompts in one request")


async def until_disconnect(receive: Callable[[], Awaitable[Message]], work: Awaitable[T]) -> T:
    """Return the result of ``work``; cancel it, and wait for that, as soon as the client hangs up.

    Raises:
        ClientDisconnect: the client hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
