"""AsyncLLM: the asyncio interface of an engine; what the server uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Self

from elbowroom.engine.engine import Engine
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.plans import PlanText
from elbowroom.engine.queue import Gate
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import ElbowroomError, Unread

News = tuple[int, OutputDelta, RequestOutput]
"""Number of the prompt, delta, output so far."""


class AsyncLLM:
    """Streams outputs of an engine into an event loop.

    Args:
        engine: a running engine, e.g. from ``build_engine``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.parts.tokenizer
        self._mail: _Mail | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_alive

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        kv: PlanText = None,
        *,
        tenant: str = "",
        priority: int = 0,
        admission: str | None = None,
        deadline_s: float | None = None,
        gate: Gate | None = None,
        max_unread: int | None = None,
    ) -> OutputStream:
        """Queue one request for each prompt and return the stream of their outputs, which the caller must close.

        With ``kv`` they ask for one of the engine's KV plans, with ``admission`` for an admission policy, and with
        ``deadline_s`` for their first token in so many seconds (order ``slo``). ``gate`` sees the queue before the
        first of them enters, and the others follow it. With ``max_unread`` the stream fails when
        more deltas than that wait to be read.

        Raises:
            RequestError: a prompt is malformed or can never fit; none of them runs then.
            Overloaded: too many requests are live.
            EngineClosed: the engine was shut down.
        """
        stream = OutputStream(self, max_unread)
        try:
            accepted = [
                stream.enqueue(
                    index,
                    ids,
                    sampling,
                    kv,
                    tenant=tenant,
                    priority=priority,
                    admission=admission,
                    deadline_s=deadline_s,
                    gate=None if index else gate,
                )
                for index, ids in enumerate(prompts)
            ]
            await asyncio.gather(*map(asyncio.wrap_future, accepted))
        except BaseException:
            stream.close()
            raise
        return stream

    async def stream(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncIterator[tuple[OutputDelta, RequestOutput]]:
        """Yield every delta with the output so far; leaving the loop early aborts the request.

        Raises:
            RequestError: before anything is yielded, if the request is malformed or can never fit.
        """
        with await self.start([prompt_token_ids], sampling) as stream:
            async for _, delta, output in stream:
                yield delta, output

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> RequestOutput:
        """Return the whole output of one request."""
        result: RequestOutput | None = None
        async for _, output in self.stream(prompt_token_ids, sampling):
            result = output
        assert result is not None
        return result

    def mail(self) -> _Mail:
        """Return the mail to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mail(loop)
        return self._mail


class _Mail:
    """Carries deltas from the engine's thread to one event loop.

    The loop is woken once for all that comes until it looks, such as the tokens of one step for all streams.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[tuple[OutputStream, News]] = deque()
        self._is_called = False

    def send(self, stream: OutputStream, news: News) -> None:
        """Hand over ``news``; called on the engine's thread."""
        self._items.append((stream, news))
        if not self._is_called:
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # first: what comes from here on calls again
        while self._items:
            stream, news = self._items.popleft()
            stream.take(news)


class OutputStream:
    """Deltas of requests that were started together, in the order in which they arrive: (prompt, delta, output).

    ``output`` is the live object of the engine and may be ahead of ``delta``.
    """

    def __init__(self, llm: AsyncLLM, max_unread: int | None = None) -> None:
        self._engine, self._mail, self._max_unread = llm.engine, llm.mail(), max_unread
        self._failure: ElbowroomError | None = None
        self.has_begun = False
        """Whether anything has arrived."""
        self._arrived: deque[News] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._open: dict[int, int] = {}

    def enqueue(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        kv: PlanText = None,
        *,
        tenant: str = "",
        priority: int = 0,
        admission: str | None = None,
        deadline_s: float | None = None,
        gate: Gate | None = None,
    ) -> Future[None]:
        """Queue one request; errors as in ``AsyncLLM.start``, here or from the future."""

        def sink(delta: OutputDelta, output: RequestOutput) -> None:
            self._mail.send(self, (index, delta, output))

        request_id, accepted = self._engine.enqueue(
            prompt_token_ids,
            sampling,
            sink,
            kv=kv,
            tenant=tenant,
            priority=priority,
            admission=admission,
            deadline_s=deadline_s,
            gate=gate,
        )
        self._open[request_id] = sampling.n
        return accepted

    def take(self, news: News) -> None:
        """Take in what arrived; called on the event loop."""
        if self._failure is not None:
            return
        self._arrived.append(news)
        self.has_begun = True
        if self._max_unread is not None and len(self._arrived) > self._max_unread:
            unread = f"the answer was dropped: {self._max_unread} pieces of it were not read"
            self.fail(Unread(unread, "read the stream faster, or ask for fewer tokens"))
        self._wake()

    def fail(self, error: ElbowroomError) -> None:
        """Abort everything and let the reader have ``error`` instead of what it has not read yet."""
        self._failure = error
        self._arrived.clear()
        for request_id in self._open:
            self._engine.abort(request_id)
        self._wake()

    async def is_waiting(self) -> bool:
        """Return whether nothing has begun and something has not ended."""
        return await asyncio.wrap_future(self._engine.is_waiting(frozenset(self._open)))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Abort what has not ended, or is only being queued."""
        for request_id in self._open:
            self._engine.abort(request_id)
        self._open.clear()

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> News:
        """Return the next delta.

        Raises:
            ElbowroomError: a request failed.
        """
        if not self._open:
            raise StopAsyncIteration
        while not self._arrived and self._failure is None:
            self._waiter = self._mail.loop.create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        index, delta, output = self._arrived.popleft()
        if delta.error is not None:
            raise delta.error
        if delta.finish_reason is not None:
            self._open[output.request_id] -= 1
            if self._open[output.request_id] == 0:
                del self._open[output.request_id]
        return index, delta, output
