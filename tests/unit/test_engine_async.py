"""AsyncLLM: streams that are left, batches that are refused, engines that are closed or die under their readers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.http import assert_no_leak, tiny_llm, wait_idle

from elbowroom.engine.async_llm import AsyncLLM, OutputStream
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import ContextTooLong, EngineClosed, RequestError


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    made = tiny_llm(tmp_path_factory.mktemp("tiny"))
    yield made
    assert_no_leak(made)
    made.engine.close()


def test_the_stream_of_an_async_llm_aborts_when_it_is_left(llm: AsyncLLM) -> None:
    async def leave_early() -> OutputDelta:
        stream = llm.stream([1, 2, 3], SamplingParams(ignore_eos=True))
        async for delta, _ in stream:
            await stream.aclose()  # type: ignore[attr-defined]
            return delta
        raise AssertionError

    assert len(asyncio.run(leave_early()).token_ids) == 1
    wait_idle(llm)


def test_no_request_of_a_batch_runs_when_one_is_refused(llm: AsyncLLM) -> None:
    async def start() -> None:
        await llm.start([[1]] * 5 + [[1] * 600], SamplingParams(ignore_eos=True))

    with pytest.raises(ContextTooLong):
        asyncio.run(start())
    wait_idle(llm)


def test_errors_of_a_closed_engine_reach_the_waiting_reader(tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = tiny_llm(tmp_path_factory.mktemp("closing"), context=8192)

    async def read() -> None:
        count = 0
        async for _ in llm.stream([1], SamplingParams(ignore_eos=True)):
            count += 1
            if count == 3:
                await asyncio.to_thread(llm.engine.close)

    with pytest.raises(EngineClosed):
        asyncio.run(read())


def test_generate_returns_the_whole_output_or_raises(llm: AsyncLLM) -> None:
    output = asyncio.run(llm.generate([1, 2], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)))

    assert output.finished
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(RequestError):
        asyncio.run(llm.generate([], SamplingParams()))


def test_the_loop_is_woken_once_for_the_deltas_of_many_streams(llm: AsyncLLM) -> None:
    """However much arrives before the loop looks, it comes in order, to its own stream, with one call."""

    async def play() -> tuple[list[int], list[int], int]:
        loop, calls = asyncio.get_running_loop(), 0
        real = loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **options)

        streams = [OutputStream(llm), OutputStream(llm)]
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        for number in range(10):
            stream = streams[number % 2]
            llm.mail().send(stream, (number, OutputDelta(0, "", [], [], None), RequestOutput(7, (), [])))
        for stream in streams:
            stream._open[7] = 1
        seen = [[(await anext(stream))[0] for _ in range(5)] for stream in streams]
        return seen[0], seen[1], calls

    assert asyncio.run(play()) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9], 1)
