"""A model that thinks, over HTTP: what is thinking, what is answer, and what it costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion
from tests.support.http import parse_metrics, tiny_llm

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.build import build_engine
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import RequestError
from elbowroom.serve import create_app

SUM = [{"role": "user", "content": "A3B8C5D9"}]
WORKING = "A003B011C016D025"
Call = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    made = AsyncLLM(build_engine("builtin-thinking", "64MiB"))
    yield made
    made.engine.close()


def caller(llm: AsyncLLM) -> Call:
    app = create_app({"model": llm})

    def call(path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await (client.get(path) if body is None else client.post(path, json=body))

        return asyncio.run(send())

    return call


@pytest.fixture(scope="module")
def call(llm: AsyncLLM) -> Call:
    return caller(llm)


def chat(call: Call, **fields: Any) -> dict[str, Any]:
    response = call("/v1/chat/completions", {"messages": SUM, "temperature": 0, "max_tokens": 64, **fields})
    made: dict[str, Any] = response.raise_for_status().json()
    return made


def test_thinking_stands_beside_the_answer(call: Call) -> None:
    body = chat(call)
    message = body["choices"][0]["message"]

    assert (message["reasoning_content"], message["content"]) == (WORKING, "25")
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = ChatCompletion.model_validate(body).usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == len(WORKING)
    assert usage.completion_tokens == len(WORKING) + len("25") + 3, "two marks and the end"


@pytest.mark.parametrize("extra", [{}, {"thinking_token_budget": 6}, {"stop": ["zz"]}, {"logprobs": True}])
def test_a_stream_is_split_as_the_whole_answer_is(call: Call, extra: dict[str, Any]) -> None:
    whole = chat(call, **extra)["choices"][0]["message"]
    fields = {"messages": SUM, "temperature": 0, "max_tokens": 64, "stream": True, **extra}
    lines = call("/v1/chat/completions", fields).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]

    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == whole[name]
    kinds = [name for delta in deltas for name in ("reasoning_content", "content") if delta.get(name)]
    assert kinds == sorted(kinds, reverse=True), "first the thinking, then the answer"


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_is_kept_exactly_by_every_sample(call: Call, budget: int) -> None:
    body = chat(call, thinking_token_budget=budget, n=2, temperature=1, seed=1)

    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * budget
    for choice in body["choices"]:
        assert len(choice["message"].get("reasoning_content", "")) == budget
        assert choice["message"]["content"].isdigit()


def test_a_reserve_leaves_an_answer(call: Call) -> None:
    without, reserved = (chat(call, max_tokens=16, **extra) for extra in ({}, {"answer_reserve": 4}))

    assert without["choices"][0]["message"]["content"] == ""
    assert without["choices"][0]["finish_reason"] == "length"
    assert reserved["choices"][0]["message"]["content"].isdigit()
    assert reserved["usage"]["completion_tokens_details"]["reasoning_tokens"] == 16 - 4 - 2


def test_completions_give_the_text_as_it_was_written(call: Call) -> None:
    prompt = "<|user|>A3B8<|end|><|assistant|>"
    body = call("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 32}).json()
    assert body["choices"][0]["text"] == "<think>A003B011</think>11"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8


def test_metrics_count_thinking_and_the_first_visible_text(llm: AsyncLLM) -> None:
    call = caller(llm)
    used = chat(call)["usage"]["completion_tokens_details"]["reasoning_tokens"]
    chat(call, max_tokens=4)
    samples = parse_metrics(call("/metrics").text)

    assert samples["elbowroom_reasoning_tokens_total{model=model}"] == used + 3
    assert samples["elbowroom_time_to_first_token_seconds_count{model=model}"] == 2
    assert samples["elbowroom_time_to_first_visible_token_seconds_count{model=model}"] == 1


def test_what_cannot_be_limited_is_refused(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path)
    try:
        call = caller(llm)
        for field in ("thinking_token_budget", "answer_reserve"):
            response = call("/v1/chat/completions", {"messages": SUM, "max_tokens": 8, field: 2})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == field
            assert "--thinking-marks" in response.json()["error"]["message"]
        with pytest.raises(RequestError, match="no marks of thinking"):
            llm.engine.submit([1], SamplingParams(max_tokens=4, thinking_budget=1), lambda *_: None)
        assert "completion_tokens_details" not in chat(call)["usage"]
    finally:
        llm.engine.close()


def test_a_malformed_budget_names_its_field(call: Call) -> None:
    for value in (-1, "many"):
        response = call("/v1/chat/completions", {"messages": SUM, "thinking_token_budget": value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "thinking_token_budget")
