"""Server-sent events: a response that ends its source as soon as the client hangs up."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elbowroom.errors import ElbowroomError
from elbowroom.serve.body import until_disconnect
from elbowroom.serve.errors import error_json

DONE = b"[DONE]"


class EventStream(Response):
    """Sends each item of ``events`` as one event, then ``[DONE]``; an error becomes the last event instead.

    Args:
        events: JSON texts; closed in every case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = events
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    def init_headers(self, headers: dict[str, str] | None = None) -> None:  # type: ignore[override]
        """Set the headers; there is no length to tell."""
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; a client that hangs up ends it silently."""
        try:
            await until_disconnect(receive, self._send(send))
        except (ClientDisconnect, OSError):
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await _send_event(send, event)
            await _send_event(send, DONE)
        except ElbowroomError as error:
            await _send_event(send, error_json(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
