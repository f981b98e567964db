"""OpenRequests: generating requests that are open, from their head to the end of their answer; none while draining."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from starlette.types import ASGIApp, Receive, Scope, Send

from elbowroom.errors import Draining, ElbowroomError, Overloaded
from elbowroom.serve.errors import error_response

_SKIP_S, _SKIP_BYTES = 1.0, 8 << 20
_REFUSED = SimpleNamespace(path="refused")
"""Stands for the route of requests that never reach one."""


class OpenRequests:
    """Counts them, and says whether there may be more.

    Args:
        most: more are refused.
    """

    def __init__(self, most: int) -> None:
        self.num_open = 0
        self.is_draining = False
        """Once set, nothing new is taken."""
        self._most = most

    def check(self) -> None:
        """Check that one more may come.

        Raises:
            Draining: the server is ending.
            Overloaded: too many are open.
        """
        if self.is_draining:
            raise Draining("the server is ending and takes no new requests", "retry later, or ask another server")
        if self.num_open >= self._most:
            raise Overloaded(f"{self.num_open} requests are open on this server already", "retry later")


class HoldRequests:
    """ASGI middleware that keeps ``requests`` up to date; only POSTs under /v1 count."""

    def __init__(self, app: ASGIApp, requests: OpenRequests) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        try:
            self._requests.check()
        except ElbowroomError as error:
            scope["route"] = _REFUSED
            response = error_response(error)
            response.headers["Connection"] = "close"
            if not any(name == b"expect" for name, _ in scope["headers"]):  # else it would be asked to send its body
                await _skip_body(receive)
            await response(scope, receive, send)
            return
        self._requests.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests.num_open -= 1


async def _skip_body(receive: Receive) -> None:
    """Read what the client still sends, up to a bound: bytes left unread reset the connection."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SKIP_S):
            while num_bytes <= _SKIP_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
