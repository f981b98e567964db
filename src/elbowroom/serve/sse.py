"""Server-sent events: a response that ends its source as soon as the client hangs up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elbowroom.errors import ElbowroomError
from elbowroom.serve.body import until_disconnect
from elbowroom.serve.errors import error_json

_LOG = logging.getLogger(__name__)


class EventStream(Response):
    """Sends each item of ``events`` as one event, then ``[DONE]``; an error becomes the last event instead.

    Args:
        events: JSON texts.
        source: what ``events`` reads; both are closed in every case, even when nothing was read.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], source: AsyncGenerator[object]) -> None:
        self._events, self._source = events, source
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; a client that hangs up ends it silently."""
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                await until_disconnect(receive, self._send(send))
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._data():
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                yield event
        except Exception as error:  # noqa: BLE001  the status is sent already: whatever it is, the client must see it
            if not isinstance(error, ElbowroomError):
                _LOG.error("a stream failed", exc_info=error)
            yield error_json(error)
        else:
            yield b"[DONE]"
