"""A real server and the official client: what people do all day."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from tests.support.http import assert_no_leak, client_of, metrics_of, running, tiny_llm, wait_idle

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.serve import Server

FORCED: dict[str, Any] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> AsyncLLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Server]:
    with running({"tiny": llm}) as made:
        yield made
        assert_no_leak(llm)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server) as made:
        yield made


def chat(client: OpenAI, text: str, **settings: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **settings)


def test_a_streamed_completion_equals_the_whole_one(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 40, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]

    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert len(pieces) > 10
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    streamed = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    assert [token for each in streamed for token in each.tokens or []] == logprobs.tokens
    assert [offset for each in streamed for offset in each.text_offset or []] == logprobs.text_offset
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_streamed_chat_equals_the_whole_one(client: OpenAI) -> None:
    whole = chat(client, "Hello", max_tokens=40, temperature=0, seed=1)
    chunks = list(chat(client, "Hello", max_tokens=40, temperature=0, seed=1, stream=True))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_equal_seeds_give_equal_texts_and_others_differ(client: OpenAI) -> None:
    def text(seed: int) -> str:
        answer: str = chat(client, "Tell", max_tokens=24, temperature=1.0, seed=seed).choices[0].message.content
        return answer

    assert text(5) == text(5)
    assert len({text(seed) for seed in (5, 6, 7)}) > 1


def test_n_samples_differ_and_share_the_prompt(client: OpenAI) -> None:
    answer = chat(client, "x" * 150, max_tokens=12, n=4, seed=3, extra_body=FORCED)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 48


def test_a_stream_of_n_samples_is_sorted_out_by_index(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 12, "seed": 9}
    whole = client.completions.create(**settings)
    texts = [""] * 4
    for chunk in client.completions.create(stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text

    assert texts == [choice.text for choice in whole.choices]


def test_a_stop_string_is_cut_off_in_both_ways(client: OpenAI) -> None:
    whole = chat(client, "Go", max_tokens=30, temperature=0).choices[0].message.content
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]

    answer = chat(client, "Go", max_tokens=30, temperature=0, stop=[stop])
    chunks = list(chat(client, "Go", max_tokens=30, temperature=0, stop=stop, stream=True))

    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logit_bias_decides_the_token(client: OpenAI) -> None:
    answer = chat(client, "Go", max_tokens=5, logit_bias={str(ord("Z")): 100}, temperature=0)

    assert answer.choices[0].message.content == "ZZZZZ"


def test_a_repeated_prompt_is_read_from_the_cache(client: OpenAI) -> None:
    first = chat(client, "cache me " * 40, max_tokens=2, temperature=0)
    second = chat(client, "cache me " * 40, max_tokens=2, temperature=0)

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 320
    assert second.choices[0].message.content == first.choices[0].message.content


def test_models_and_errors_are_those_of_the_client(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", max_tokens=5000, stream=True)


def test_leaving_a_stream_frees_its_memory(client: OpenAI, llm: AsyncLLM) -> None:
    stream = client.completions.create(model="tiny", prompt="y" * 300, max_tokens=1700, stream=True, extra_body=FORCED)
    next(iter(stream))
    assert llm.engine.stats().num_running == 1
    generated = llm.engine.stats().generated_tokens
    stream.close()

    wait_idle(llm, 1.0)
    assert llm.engine.stats().generated_tokens - generated < 1000


def test_a_client_that_gives_up_waiting_frees_its_memory(server: Server, llm: AsyncLLM) -> None:
    fields = {"prompt": ["z", "zz"], "n": 2, "max_tokens": 2000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=fields, timeout=0.3)

    wait_idle(llm, 1.0)
    assert metrics_of(server)["elbowroom_live_http_requests{model=tiny}"] == 0


def test_twenty_clients_at_once_get_what_they_would_get_alone(client: OpenAI, llm: AsyncLLM) -> None:
    prompts = [f"{index} " * (1 + 7 * index) for index in range(20)]

    def text(prompt: str) -> str:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=16, seed=4, extra_body=FORCED)
        return answer.choices[0].text

    alone = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(text, prompts))

    assert together == alone
    wait_idle(llm)


def test_a_client_that_reads_slowly_does_not_hold_up_others(client: OpenAI) -> None:
    slow = client.completions.create(model="tiny", prompt="s", max_tokens=1500, stream=True, extra_body=FORCED)
    next(iter(slow))
    started = time.monotonic()
    chat(client, "quick", max_tokens=4)

    assert time.monotonic() - started < 5
    slow.close()


def test_two_models_have_budgets_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    small = tiny_llm(tmp_path_factory.mktemp("small"), memory="24MiB", seed=1)
    large = tiny_llm(tmp_path_factory.mktemp("large"), memory="40MiB", seed=2, family="llama")
    with running({"small": small, "large": large}) as server, client_of(server) as client:
        texts = {
            name: client.completions.create(model=name, prompt="Who", max_tokens=12, temperature=0).choices[0].text
            for name in ("small", "large")
        }
        with pytest.raises(openai.NotFoundError, match="small, large"):
            client.completions.create(model="medium", prompt="a")
        numbers = metrics_of(server)

    assert texts["small"] != texts["large"]
    assert numbers["elbowroom_memory_budget_bytes{model=small,tier=host}"] == 24 * 2**20
    assert numbers["elbowroom_memory_budget_bytes{model=large,tier=host}"] == 40 * 2**20
