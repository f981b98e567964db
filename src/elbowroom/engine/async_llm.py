"""AsyncLLM: the asyncio interface of an engine; what the server uses."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from elbowroom.engine.core import Sink
from elbowroom.engine.engine import Engine
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import EngineClosed

_ALIVE_POLL_S = 1.0
"""A caller that waits looks this often whether the engine's thread still runs."""
_SUBMIT_THREADS = 64
"""Requests that can be on their way into the engine at once; each waits for the end of the current step."""


class AsyncLLM:
    """Streams outputs of an engine into an event loop.

    Args:
        engine: a running engine, e.g. from ``build_engine``.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.parts.tokenizer
        self._thread = engine.call(threading.current_thread).result()
        self._submitters = ThreadPoolExecutor(_SUBMIT_THREADS, thread_name_prefix="elbowroom-submit")

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    async def start(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> OutputStream:
        """Queue one request for each prompt and return the stream of their outputs, which the caller must close.

        Raises:
            RequestError: a prompt is malformed or can never fit; none of them runs then.
            Overloaded: too many requests are live.
            EngineClosed: the engine was shut down.
        """
        stream = OutputStream(self)
        try:
            await asyncio.gather(*(stream.submit(index, ids, sampling) for index, ids in enumerate(prompts)))
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

    def submit(self, prompt: Sequence[int], sampling: SamplingParams, sink: Sink) -> asyncio.Future[int]:
        """Queue a request from a thread of its own (the engine answers between two steps); return its id to come."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._submitters, self.engine.submit, prompt, sampling, sink)

    def abort(self, request_id: int) -> None:
        """Drop a request; it is no error if the engine was closed meanwhile."""
        with contextlib.suppress(EngineClosed):
            self.engine.abort(request_id)


class OutputStream:
    """Deltas of requests that were started together, in the order in which they arrive: (prompt, delta, output).

    ``output`` is the live object of the engine and may be ahead of ``delta``.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm, self._loop = llm, asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, OutputDelta, RequestOutput]] = asyncio.Queue()
        self._open: dict[int, int] = {}
        self._closed = False

    async def submit(self, index: int, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Queue one request; errors as in ``AsyncLLM.start``."""
        if not self._llm.is_alive:
            raise EngineClosed("the engine does not run any more")

        def sink(delta: OutputDelta, output: RequestOutput) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, delta, output))

        request_id = self._llm.submit(prompt_token_ids, sampling, sink)
        request_id.add_done_callback(lambda done: self._queued(done, sampling.n))
        while not request_id.done():
            await asyncio.wait({request_id}, timeout=_ALIVE_POLL_S)
            if not self._llm.is_alive:
                raise EngineClosed("the engine does not run any more")
        request_id.result()

    def close(self) -> None:
        """Abort what has not ended, or is only being queued."""
        self._closed = True
        for request_id in self._open:
            self._llm.abort(request_id)
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

    async def __anext__(self) -> tuple[int, OutputDelta, RequestOutput]:
        """Return the next delta.

        Raises:
            ElbowroomError: a request failed.
        """
        if not self._open:
            raise StopAsyncIteration
        index, delta, output = await self._next()
        if delta.error is not None:
            raise delta.error
        if delta.finish_reason is not None:
            self._open[output.request_id] -= 1
            if self._open[output.request_id] == 0:
                del self._open[output.request_id]
        return index, delta, output

    async def _next(self) -> tuple[int, OutputDelta, RequestOutput]:
        while True:
            try:
                async with asyncio.timeout(_ALIVE_POLL_S):
                    return await self._arrived.get()
            except TimeoutError:
                if not self._llm.is_alive and self._arrived.empty():
                    raise EngineClosed("the engine does not run any more") from None

    def _queued(self, request_id: asyncio.Future[int], num_samples: int) -> None:
        if request_id.cancelled() or request_id.exception() is not None:
            return
        if self._closed:
            self._llm.abort(request_id.result())
        else:
            self._open[request_id.result()] = num_samples
