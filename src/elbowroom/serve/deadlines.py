"""Deadlines: end a request that waits too long to begin, or takes too long in all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from elbowroom.engine.async_llm import OutputStream
from elbowroom.errors import EngineClosed, QueueTimeout, TimedOut
from elbowroom.serve.callers import TIMEOUT_HEADER, Caller


class Deadlines:
    """Watches ``stream`` inside a ``with`` block; a deadline ends it with an error.

    Args:
        stream: what was started for the request.
        caller: how long it may take in all.
        queue_timeout_s: how long it may wait to begin; None: as long as it takes.
        retry_after_s: tells those who waited too long when to come again.
    """

    def __init__(
        self, stream: OutputStream, caller: Caller, queue_timeout_s: float | None, retry_after_s: Callable[[], int]
    ) -> None:
        self._stream, self._caller = stream, caller
        self._queue_timeout_s, self._retry_after_s = queue_timeout_s, retry_after_s
        self._timers: list[asyncio.TimerHandle] = []
        self._look: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        """Start the clocks."""
        loop, left_s = asyncio.get_running_loop(), self._caller.left_s
        if left_s is not None:
            self._timers.append(loop.call_later(left_s, self._too_slow))
        if self._queue_timeout_s is not None:
            self._timers.append(loop.call_later(self._queue_timeout_s, self._waited))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them."""
        for timer in self._timers:
            timer.cancel()
        if self._look is not None:
            self._look.cancel()

    def _too_slow(self) -> None:
        taken = f"the request did not end within {self._caller.timeout_s:g} s"
        self._stream.fail(TimedOut(taken, f"ask for fewer tokens, or allow more in {TIMEOUT_HEADER}"))

    def _waited(self) -> None:
        if not self._stream.has_begun:
            self._look = asyncio.get_running_loop().create_task(self._end_if_waiting())

    async def _end_if_waiting(self) -> None:
        """The first token is not there; only the engine knows whether the prompt is being read already."""
        try:
            is_waiting = await self._stream.is_waiting()
        except EngineClosed:
            return  # the stream is told that as well
        if is_waiting:
            error = QueueTimeout(f"the request did not begin within {self._queue_timeout_s:g} s", "retry later")
            error.retry_after_s = self._retry_after_s()
            self._stream.fail(error)
