"""HTTP/1.1 connections that must send the head of a request in time, however slowly it drips."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """Closes a connection that has sent no whole head for ``timeout_keep_alive`` seconds.

    uvicorn's own clock runs only between two requests, and stops at the first byte.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        """Start it again."""
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_headless)

    def _close_if_headless(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
