"""http: does the server survive its clients? Valid requests, hang-ups and nonsense, all at once, then the books.

A server process on the built-in model gets ``num_requests`` from 16 clients: valid ones by the official client (whole
and streamed, with random lengths), streams that are left early, sockets that close at random moments, malformed
bodies. Claims: no 5xx, no reset, no hang over 30 s, no answer that breaks the schema; and afterwards not one strip of
KV cache beyond what the prefix cache explains.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from elbowroom.errors import ElbowroomError
from elbowroom.models.hf_config import read_config
from elbowroom.models.loader import find_model

HANG_S = 30.0
WORDS = (
    "a",
    "list",
    "of",
    "words",
    "that",
    "make",
    "this",
    "prompt",
    "about",
    "memory",
    "and",
    "its",
    "budget",
    "pages",
)
SHARED = "Every second prompt begins with these words, so that prefixes are shared and evicted. " * 8
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "max_tokens": 0}',
    b'{"prompt": "a", "max_tokens": 1000000000}',
    b'{"prompt": [-1], "messages": [{"role": "user"}], "n": -1}',
    b'{"prompt": "a", "messages": [], "stop": [""]}',
    b'{"prompt": "a", "messages": "hi", "logit_bias": {"x": 1}}',
    b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "model": "no-such-model"}',
)
KINDS = {
    "completion": 20,
    "completion stream": 20,
    "chat": 15,
    "chat stream": 15,
    "cancel": 10,
    "hang up": 10,
    "malformed": 10,
}
"""What visitors do, and how often (weights)."""


@dataclass(slots=True)
class Outcome:
    """What one visit saw; ``fault`` says what was wrong with it."""

    kind: str
    fault: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(slots=True)
class Visitor:
    """One client: visits the server in the ways of ``KINDS``."""

    url: str
    model: str
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        """Make the official client, without the retries that would hide faults."""
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=HANG_S)

    def visit(self, kind: str, seed: int) -> Outcome:
        """Make one visit and return what was seen."""
        outcome, rng, started = Outcome(kind), random.Random(seed), time.perf_counter()
        try:
            self._visits()[kind](rng, outcome)
        except openai.APITimeoutError:
            outcome.fault = f"no byte for {HANG_S:.0f} s"
        except openai.APIStatusError as error:
            outcome.fault = f"HTTP {error.status_code}"
        except (openai.APIError, httpx.HTTPError) as error:
            outcome.fault = f"connection: {type(error).__name__}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # whatever a check stumbles over
            outcome.fault = f"schema: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if outcome.fault is None and time.perf_counter() - started > HANG_S:
            outcome.fault = f"took over {HANG_S:.0f} s"
        return outcome

    def _visits(self) -> dict[str, Callable[[random.Random, Outcome], None]]:
        return {
            "completion": lambda rng, outcome: self._whole(self._completion(rng), outcome),
            "completion stream": lambda rng, outcome: self._stream(self._completion(rng), outcome),
            "chat": lambda rng, outcome: self._whole(self._chat(rng), outcome),
            "chat stream": lambda rng, outcome: self._stream(self._chat(rng), outcome),
            "cancel": self._cancel,
            "hang up": self._hang_up,
            "malformed": self._malformed,
        }

    def _completion(self, rng: random.Random) -> dict[str, Any]:
        made: dict[str, Any] = {"model": self.model, "prompt": _text(rng, 300), "max_tokens": rng.randint(1, 64)}
        return made | {"seed": rng.randint(0, 99), "n": rng.choice([1, 1, 1, 2]), "logprobs": rng.choice([None, 2])}

    def _chat(self, rng: random.Random) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": _text(rng, 200)}]
        return {"model": self.model, "messages": messages, "max_tokens": rng.randint(1, 64), "seed": rng.randint(0, 99)}

    def _create(self, fields: dict[str, Any], **more: Any) -> Any:
        route = self.client.chat.completions if "messages" in fields else self.client.completions
        return route.create(**fields, **more)

    def _whole(self, fields: dict[str, Any], outcome: Outcome) -> None:
        started = time.perf_counter()
        answer = self._create(fields)
        outcome.e2e_s = time.perf_counter() - started
        _check(answer, ChatCompletion if "messages" in fields else Completion)
        _require(len(answer.choices) == fields.get("n", 1), "another number of choices than asked for")
        _require(all(choice.finish_reason in ("stop", "length") for choice in answer.choices), "finish_reason")
        _check_usage(answer.usage, fields)

    def _stream(self, fields: dict[str, Any], outcome: Outcome) -> None:
        started = time.perf_counter()
        usage, finished, arrivals = None, 0, []
        for chunk in self._create(fields, stream=True, stream_options={"include_usage": True}):
            _check(chunk, ChatCompletionChunk if "messages" in fields else Completion, is_chunk=True)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finished += choice.finish_reason is not None
                if getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None):
                    arrivals.append(time.perf_counter())
        outcome.e2e_s = time.perf_counter() - started
        _require(finished == fields.get("n", 1), "not every choice was finished")
        _check_usage(usage, fields)
        if arrivals:
            outcome.ttft_s = arrivals[0] - started
        if len(arrivals) > 1 and fields.get("n", 1) == 1:
            outcome.tpot_s = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)

    def _cancel(self, rng: random.Random, _outcome: Outcome) -> None:
        fields = (self._chat(rng) if rng.random() < 0.5 else self._completion(rng)) | {"max_tokens": 1000}
        with self._create(fields, stream=True) as stream:
            for count, _ in enumerate(stream):
                if count >= rng.randint(0, 20):
                    break

    def _hang_up(self, rng: random.Random, _outcome: Outcome) -> None:
        body = json.dumps(self._completion(rng) | {"max_tokens": 1000, "stream": rng.random() < 0.5}).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            sent = head + body
            connection.sendall(sent[: rng.randint(1, len(sent))] if rng.random() < 0.3 else sent)
            time.sleep(rng.uniform(0.0, 0.5))

    def _malformed(self, rng: random.Random, outcome: Outcome) -> None:
        route = rng.choice(["completions", "chat/completions"])
        answer = httpx.post(f"{self.url}/v1/{route}", content=rng.choice(MALFORMED), timeout=HANG_S)
        if not 400 <= answer.status_code < 500:
            outcome.fault = f"HTTP {answer.status_code} for a malformed body"
            return
        _require(set(answer.json()["error"]) == {"message", "type", "param", "code"}, "an error of another shape")


class SchemaError(ValueError):
    """An answer is not what the API promises."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SchemaError(what)


def _check(answer: BaseModel, schema: type[BaseModel], is_chunk: bool = False) -> None:
    values = answer.model_dump(exclude_unset=True, warnings=False)
    for choice in values["choices"]:
        # OpenAI sends null in all chunks but the last; its type of completions knows only whole ones.
        if is_chunk and choice["finish_reason"] is None and schema is Completion:
            choice["finish_reason"] = "stop"
    schema.model_validate(values)


def _check_usage(usage: Any, fields: dict[str, Any]) -> None:
    _require(usage is not None, "no usage")
    _require(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage does not add up")
    _require(0 < usage.completion_tokens <= fields["max_tokens"] * fields.get("n", 1), "more tokens than asked for")


def _text(rng: random.Random, most_words: int) -> str:
    return rng.choice(["", SHARED]) + " ".join(rng.choices(WORDS, k=rng.randint(1, most_words)))


@contextlib.contextmanager
def server(model: str | None, memory: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``elbowroom serve`` as a process of its own and yield it with its URL."""
    command = [sys.executable, "-m", "elbowroom.commands", "serve", "--port", "0", "--memory", memory]
    command += [] if model is None else ["--model", f"bench={model}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            match = next((found for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+", line))), None)
            if match is None:
                raise ElbowroomError(f"the server did not start: {' '.join(command)}", "read what it wrote above")
            yield process, match[0]
        finally:
            if process.poll() is None:
                process.kill()


def leaked_strips(url: str, num_layers: int, timeout_s: float = 10.0) -> int | None:
    """Return the strips that no cached prefix explains once nothing runs; None if something still runs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics", timeout=HANG_S).text
        found = re.findall(r"^elbowroom_(\w+)\{[^,}]*\} (\S+)$", text, re.MULTILINE)
        values = {name: float(value) for name, value in found}
        busy = ("num_requests_running", "num_requests_waiting", "live_http_requests")
        leaked = int(values["kv_strips"] - values["kv_cached_blocks"] * num_layers)
        if leaked == 0 and not any(values[name] for name in busy):
            return 0
        time.sleep(0.1)
    return None if any(values[name] for name in busy) else leaked


def run(
    num_requests: int = 300, seed: int = 0, model: str | None = None, memory: str = "96MiB", concurrency: int = 16
) -> dict[str, Any]:
    """Visit a server ``num_requests`` times and return ``{name, machine, rows, claims}``.

    Args:
        num_requests: visits in all.
        seed: of lengths, kinds and moments.
        model: a model directory; None is the built-in model.
        memory: the server's budget.
        concurrency: clients at once.
    """
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=num_requests)
    num_layers = len(read_config(find_model(model)).layers)
    with server(model, memory) as (process, url), ThreadPoolExecutor(concurrency) as pool:
        visitor = Visitor(url, "builtin" if model is None else "bench")
        started = time.perf_counter()
        outcomes = list(pool.map(visitor.visit, kinds, [seed * 1_000_003 + index for index in range(num_requests)]))
        elapsed = time.perf_counter() - started
        leaked = leaked_strips(url, num_layers)
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(HANG_S)
    rows = _rows(outcomes)
    rows.append({"row": "server", "seconds": elapsed, "memory": memory, "exit_code": exit_code})
    print(_table(rows), file=sys.stderr)
    return {"name": "http", "machine": _machine(), "rows": rows, "claims": _claims(outcomes, leaked, exit_code)}


def _claims(outcomes: Sequence[Outcome], leaked: int | None, exit_code: int) -> list[dict[str, Any]]:
    faults = Counter(f"{outcome.kind}: {outcome.fault}" for outcome in outcomes if outcome.fault)
    if exit_code != 0:
        faults[f"the server ended with code {exit_code}"] += 1
    listed = "; ".join(f"{count} x {what}" for what, count in faults.most_common(5))
    reason = listed or f"{len(outcomes)} visits, none saw a 5xx, a reset, a hang over {HANG_S:.0f} s or a wrong schema"
    held = "something still runs 10 s after the last visit" if leaked is None else "strips beyond the prefix cache"
    return [
        _claim("http.errors", faults.total(), "visits", reason),
        _claim("http.leaks", leaked, "strips", held),
    ]


def _claim(name: str, value: int | None, unit: str, reason: str) -> dict[str, Any]:
    holds = value is not None and value <= 0
    made = {"id": name, "value": value, "op": "<=", "target": 0, "unit": unit, "holds": holds}
    return made | {"num_runs": 1, "low": value, "high": value, "reason": reason}


def _machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "num_cpus": os.cpu_count(), "python": platform.python_version()}


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = sorted(value for each in outcomes if (value := getattr(each, name)) is not None)
        if len(values) > 1:
            p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
            rows.append({"row": name, "count": len(values), "p50": statistics.median(values), "p95": p95})
    counts, faults = Counter(each.kind for each in outcomes), Counter(each.kind for each in outcomes if each.fault)
    return rows + [{"row": kind, "count": count, "faults": faults[kind]} for kind, count in sorted(counts.items())]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'latency':<8}{'count':>7}{'p50':>12}{'p95':>12}"]
    for row in rows:
        if "p50" in row:
            name = row["row"].removesuffix("_s").upper()
            lines.append(f"{name:<8}{row['count']:>7}{row['p50'] * 1e3:>9.1f} ms{row['p95'] * 1e3:>9.1f} ms")
    return "\n".join(lines)
