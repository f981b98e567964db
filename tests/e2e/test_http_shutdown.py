"""How a server begins and ends: ports, signals, running streams. Each server is a process of its own."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.errors import ElbowroomError
from elbowroom.serve import Server

SCRIPT = """
import sys
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.build import build_engine
from elbowroom.serve import ServerLimits, serve
limits = ServerLimits(drain_timeout_s=float(sys.argv[2]))
serve({"tiny": AsyncLLM(build_engine(sys.argv[1], "48MiB"))}, port=0, limits=limits)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=8192)


@contextlib.contextmanager
def server_process(directory: Path, drain_timeout_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SCRIPT, str(directory), str(drain_timeout_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match, line
        yield process, match[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


def test_a_running_stream_is_finished_before_the_server_ends(directory: Path) -> None:
    with (
        server_process(directory, drain_timeout_s=20) as (process, url),
        OpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        code, errors = ended(process)

    assert pieces[-1].choices[0].finish_reason == "length"
    assert (code, errors) == (0, "")


def test_after_the_grace_period_clients_are_told_and_the_server_ends(directory: Path) -> None:
    with (
        server_process(directory, drain_timeout_s=0.3) as (process, url),
        OpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)
        code, _ = ended(process)

    assert code == 0
    assert time.monotonic() - started < 8


def test_an_idle_server_ends_at_once_and_says_where_it_was(directory: Path) -> None:
    with server_process(directory, drain_timeout_s=10) as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)

        assert ended(process) == (0, "")
        assert time.monotonic() - started < 8
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_port_in_use_is_named_with_the_flag_that_changes_it() -> None:
    engines: dict[str, AsyncLLM] = {}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ElbowroomError, match=f"port {port} .*in use(.|\n)*--port"):
            Server(engines, port=port)
    with pytest.raises(ElbowroomError, match="cannot listen"):
        Server(engines, port=99999)
    with pytest.raises(ElbowroomError, match="cannot listen"):
        Server(engines, host="256.1.1.1", port=0)


def test_while_it_drains_new_requests_get_503_and_a_second_signal_ends_it_at_once(directory: Path) -> None:
    fields = {"prompt": "a", "max_tokens": 8000, "n": 16, "ignore_eos": True}

    def ask(url: str) -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json=fields, timeout=60)

    with server_process(directory, drain_timeout_s=60) as (process, url), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url)
        until(lambda: httpx.get(f"{url}/ready").json()["num_open"] == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json=fields)
        ready, health = httpx.get(f"{url}/ready"), httpx.get(f"{url}/health")
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, errors = ended(process)
        cut_off = asked.result()

    assert (cut_off.status_code, cut_off.json()["error"]["code"]) == (503, "engine_closed")
    assert "Traceback" not in errors
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "1"
    assert (ready.status_code, ready.json()) == (503, {"status": "draining", "num_open": 1})
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert code == 0
    assert time.monotonic() - started < 15


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
