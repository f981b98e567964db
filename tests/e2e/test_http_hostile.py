"""Malformed bodies, clients that vanish and other bad company: the server answers 4xx and lives on."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.http import assert_no_leak, running, tiny_llm, wait_idle

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.serve import Server, ServerLimits

ROUTES = ("/v1/completions", "/v1/chat/completions")
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1e308, -0.0, 0.5, "", "a", "\ud83d\ude00", "\x00", "a" * 3000,
    [], [[]], {}, {"a": 1}, [1, 2], [300], [-5], ["a", "b"], [None], [["a"]], {"1": 5}, {"-1": 5}, {"type": "text"},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> AsyncLLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Server]:
    limits = ServerLimits(drain_timeout_s=1.0, max_body_bytes=2**20)
    with running({"tiny": llm}, limits) as made:
        yield made
        assert httpx.get(f"{made.url}/health").status_code == 200
        assert_no_leak(llm)


def valid_body(rng: random.Random, route: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": rng.randint(1, 4), "seed": rng.randint(0, 9)}
    if route.endswith("chat/completions"):
        return body | {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}
    return body | {"prompt": rng.choice(["hi", [5, 6], ["a", "b"]]), "logprobs": 1, "n": 2, "stop": ["q"]}


FIELDS = (
    "model", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "stream", "stream_options", "logprobs", "top_logprobs", "echo", "suffix", "best_of", "tools", "tool_choice",
    "response_format", "chat_template_kwargs", "ignore_eos", "user", "modalities",
)  # fmt: skip


def mutated(rng: random.Random, body: dict[str, Any]) -> bytes:
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(ODD)
    # A body that turns out valid must not generate for long.
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] > 100:
        body["max_tokens"] = rng.choice([3, 10**9])
    body.pop("max_completion_tokens", None) if rng.random() < 0.9 else None
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw)) :]
    return bytes(raw)


def test_randomly_damaged_bodies_never_cause_a_5xx(server: Server) -> None:
    rng = random.Random(7)
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(200):
            route = rng.choice(ROUTES)
            raw = mutated(rng, valid_body(rng, route))
            response = client.post(route, content=raw)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, (raw, response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, raw
            elif '"stream": true' not in raw.decode(errors="replace"):
                assert response.json()["choices"]

    assert statuses[400] > 40
    assert statuses[200] > 10


def test_bytes_that_are_no_http_do_no_harm(server: Server) -> None:
    rng = random.Random(8)
    for _ in range(40):
        with socket.create_connection((server.host, server.port), timeout=5) as connection:
            connection.sendall(rng.randbytes(rng.randint(1, 2000)))

    assert httpx.get(f"{server.url}/health").status_code == 200


def raw_request(server: Server, body: bytes, declared: int | None = None) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), timeout=10)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {declared or len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish_at_any_moment_leave_nothing_behind(server: Server, llm: AsyncLLM, stream: bool) -> None:
    rng = random.Random(9)
    fields = {"prompt": "gone " * 100, "max_tokens": 1500, "ignore_eos": True, "n": 2, "stream": stream}

    def visit(delay: float) -> None:
        with raw_request(server, json.dumps(fields).encode()):
            time.sleep(delay)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(visit, [rng.uniform(0, 0.4) for _ in range(36)]))

    wait_idle(llm, 2.0)
    assert llm.engine.stats().finished.get("error", 0) == 0


def test_a_client_that_vanishes_in_the_middle_of_its_body_is_forgotten(server: Server, llm: AsyncLLM) -> None:
    raw_request(server, b'{"prompt": "a', declared=500).close()

    wait_idle(llm)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_bodies_that_are_too_large_are_refused_declared_or_chunked(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"a" * 65536

    with httpx.Client(base_url=server.url, timeout=10) as client:
        assert client.post(ROUTES[0], content=b"a" * (2**20 + 1)).status_code == 413
        # The server may close before it has read everything.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            assert client.post(ROUTES[0], content=chunks()).status_code == 413
        assert client.get("/health").status_code == 200


def test_heads_and_bodies_that_drip_end_in_time(tmp_path: Path) -> None:
    drips = {"head": b"POST /v1/completions HTTP/1.1\r\nX: ", "body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"}
    drips["body"] += b"Content-Length: 500\r\n\r\n{"
    limits = ServerLimits(drain_timeout_s=1.0, idle_timeout_s=1, body_timeout_s=1.0)
    answers: dict[str, bytes] = {}
    with running({"tiny": tiny_llm(tmp_path)}, limits) as server:
        for kind, begin in drips.items():
            with socket.create_connection((server.host, server.port), timeout=10) as connection:
                connection.sendall(begin)
                with contextlib.suppress(ConnectionError):
                    answers[kind] = connection.recv(1000)

    assert answers.get("head", b"") == b""
    assert answers["body"].startswith(b"HTTP/1.1 408")
