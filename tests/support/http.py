"""A real server on an ephemeral loopback port, in a thread of the test; and its numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.build import build_engine
from elbowroom.serve import Server, ServerLimits

BUILD = "max_sequences", "prefix_cache", "kv_choices", "kv_relief", "scheduling"


def tiny_llm(directory: Path, memory: str = "48MiB", **settings: object) -> AsyncLLM:
    """Return an engine over a random model written to ``directory``."""
    build = {key: settings.pop(key) for key in BUILD if key in settings}
    write_tiny_model(directory, **settings)  # type: ignore[arg-type]
    return AsyncLLM(build_engine(str(directory), memory, **build))  # type: ignore[arg-type]


@contextmanager
def running(engines: Mapping[str, AsyncLLM], limits: ServerLimits | None = None) -> Iterator[Server]:
    """Serve ``engines`` until the end of the block, which closes them."""
    server = Server(engines, port=0, limits=limits or ServerLimits(drain_timeout_s=1.0), announce=lambda _: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def client_of(server: Server, **settings: object) -> OpenAI:
    """Return the official client, without retries that would hide errors."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60.0, **settings)  # type: ignore[arg-type]


def metrics_of(server: Server) -> dict[str, float]:
    """Return every sample of /metrics by name and labels, e.g. ``name{model=tiny}``."""
    return parse_metrics(httpx.get(f"{server.url}/metrics").raise_for_status().text)


def parse_metrics(text: str) -> dict[str, float]:
    """Return the samples of a Prometheus text."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def wait_idle(llm: AsyncLLM, timeout_s: float = 1.0) -> None:
    """Wait until nothing runs or waits, then check that books and store agree and only cached prefixes are stored."""
    engine = llm.engine
    deadline = time.monotonic() + timeout_s
    while True:
        stats, report = engine.stats(), engine.kv_report()
        idle = stats.num_running == stats.num_waiting == 0
        if idle and (stats.cached_blocks > 0 or report.num_sequences == 0):
            break
        assert time.monotonic() < deadline, f"not idle after {timeout_s} s: {stats}, {report}"
        time.sleep(0.01)
    engine.check_integrity()


def assert_no_leak(llm: AsyncLLM) -> None:
    """Check that nothing is stored once the prefix cache is emptied."""
    wait_idle(llm, 5.0)
    llm.engine.clear_cache()
    report = llm.engine.kv_report()
    assert (report.num_sequences, report.num_strips, report.live_bytes) == (0, 0, 0), report
    llm.engine.check_integrity()
