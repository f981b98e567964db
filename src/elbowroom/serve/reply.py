"""What both generating routes share: run, watch the client, answer at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from elbowroom import __version__
from elbowroom.engine.output import OutputDelta
from elbowroom.serve.body import until_disconnect
from elbowroom.serve.generation import Choice, Deltas, Generation
from elbowroom.serve.requests import GenerationRequest
from elbowroom.serve.responses import Schema
from elbowroom.serve.sse import EventStream


class Reply(Protocol):
    """How one route writes what was generated."""

    def full(self) -> Schema:
        """Return the whole answer."""

    def opening(self, choice: Choice) -> bytes | None:
        """Return the chunk that a streamed choice begins with."""

    def chunk(self, choice: Choice, delta: OutputDelta) -> bytes | None:
        """Return the chunk for ``delta``, or None if there is nothing to send yet."""

    def closing(self) -> Schema:
        """Return the chunk with the usage that ends a stream."""


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return the fields that every answer and chunk begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"elbowroom-{__version__}",
    }


def wants_usage(body: GenerationRequest) -> bool:
    """Return whether a stream is to end with its usage."""
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


async def respond(request: Request, body: GenerationRequest, generation: Generation, reply: Reply) -> Response:
    """Generate and return the response, which for a stream goes on generating.

    Raises:
        ClientDisconnect: the client hung up; what ran for it is aborted.
        ElbowroomError: the request is refused, or failed before its answer began.
    """
    if not body.stream:
        await until_disconnect(request.receive, generation.run())
        return Response(reply.full().json_bytes(), media_type="application/json")
    deltas = generation.deltas()
    # A refused request must be an HTTP error, so wait until everything is queued.
    await until_disconnect(request.receive, anext(deltas))
    return EventStream(_chunks(generation, deltas, reply, wants_usage(body)), deltas)


async def _chunks(generation: Generation, deltas: Deltas, reply: Reply, with_usage: bool) -> AsyncGenerator[bytes]:
    for choice in generation.choices:
        opening = reply.opening(choice)
        if opening is not None:
            yield opening
    async for news in deltas:
        chunk = None if news is None else reply.chunk(*news)
        if chunk is not None:
            yield chunk
    if with_usage:
        yield reply.closing().json_bytes()
