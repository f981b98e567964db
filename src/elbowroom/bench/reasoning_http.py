"""Do client and server count alike? The reasoning load over HTTP, counted from the stream and from the metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx

from elbowroom.bench.base import Row
from elbowroom.bench.http import server
from elbowroom.bench.reasoning_load import TIMEOUT_S, Outcome, Question

_COUNTERS = "generation_tokens_total", "reasoning_tokens_total"
_LATENCIES = {
    "ttft_s": "time_to_first_token_seconds",
    "ttfvt_s": "time_to_first_visible_token_seconds",
    "e2e_s": "e2e_request_latency_seconds",
}


def compare_counters(model: str, memory: str, asked: Sequence[Question], max_tokens: int) -> list[Row]:
    """Return one row a counter: what clients and the server say, and by which share they differ.

    Clients take tokens from ``usage`` and times from their own clocks; how many chunks they got is shown beside, as
    counting those is a common mistake.
    """
    limits = httpx.Limits(max_connections=len(asked))
    with (
        server(model, memory) as (_, url),
        httpx.Client(timeout=TIMEOUT_S, limits=limits) as client,
        ThreadPoolExecutor(len(asked)) as pool,
    ):
        begin = time.monotonic()
        jobs = [pool.submit(_ask, client, url, each, max_tokens, begin) for each in asked]
        answers = [job.result() for job in jobs]
        counted = _metrics(url)
    outcomes, chunks = [each for each, _, _ in answers], sum(number for _, _, number in answers)
    own = {
        "generation_tokens_total": sum(tokens for _, tokens, _ in answers),
        "reasoning_tokens_total": sum(each.num_reasoning_tokens for each in outcomes),
    }
    rows = [_row(name, own[name], counted[name]) | {"is_claimed": True} for name in _COUNTERS]
    rows[0]["chunks"] = chunks
    for name, metric in _LATENCIES.items():
        values = [
            getattr(each.latencies, name) for each in outcomes if name != "ttfvt_s" or each.num_hidden is not None
        ]
        theirs = counted[f"{metric}_sum"] / max(counted[f"{metric}_count"], 1.0)
        rows.append(_row(metric, sum(values) / len(values), theirs) | {"is_claimed": False})
    return list(rows)


def _ask(client: httpx.Client, url: str, question: Question, max_tokens: int, begin: float) -> tuple[Outcome, int, int]:
    """Return what one client saw since it asked, the tokens by ``usage``, and how many chunks of text it got."""
    outcome, tokens, chunks = Outcome(replace(question, arrival_s=0.0)), 0, 0
    body = {
        "messages": list(question.messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    time.sleep(max(begin + question.arrival_s - time.monotonic(), 0.0))
    started = time.monotonic()
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now_s = json.loads(line.removeprefix("data: ")), time.monotonic() - started
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
                outcome.num_reasoning_tokens = chunk["usage"]["completion_tokens_details"]["reasoning_tokens"]
            for choice in chunk["choices"]:
                delta = choice["delta"]
                thought, answer = delta.get("reasoning_content") or "", delta.get("content") or ""
                chunks += bool(thought or answer)
                if thought or answer or choice["finish_reason"]:
                    outcome.take(1, answer, now_s)
                outcome.finish_reason = choice["finish_reason"] or outcome.finish_reason
    return outcome, tokens, chunks


def _metrics(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).raise_for_status().text
    return {
        name: float(value)
        for name, value in re.findall(r'^elbowroom_(\w+)\{model="bench"\} (\S+)$', text, re.MULTILINE)
    }


def _row(name: str, client: float, counted: float) -> dict[str, object]:
    return {
        "part": "counters",
        "counter": name,
        "client": client,
        "server": counted,
        "difference": abs(client - counted) / max(abs(counted), 1e-9),
    }
