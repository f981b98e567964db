"""http: does the server survive its clients? Valid requests, hang-ups and nonsense, all at once, then the books.

A server process on the built-in model gets ``num_requests`` from 16 clients: valid ones by the official client (whole
and streamed, with random lengths), streams that are left early, sockets that close at random moments, malformed
bodies. Claims: no 5xx, no reset, no hang over 30 s, no answer that breaks the schema; and afterwards not one strip of
KV cache beyond what the prefix cache explains.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from elbowroom.bench.base import BenchOptions, BenchResult, Claim
from elbowroom.bench.http_visitor import HANG_S, KINDS, Outcome, Visitor
from elbowroom.bench.machine import machine_info
from elbowroom.errors import ElbowroomError
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config


@contextlib.contextmanager
def server(
    model: str | None, memory: str, port: int = 0, options: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``elbowroom serve`` as a process of its own and yield it with its URL."""
    command = [sys.executable, "-m", "elbowroom.commands", "serve", "--port", str(port), "--memory", memory, *options]
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


def run(options: BenchOptions) -> BenchResult:
    """Visit a server 300 times (quick: 28)."""
    return visit(num_requests=28 if options.quick else 300, seed=options.seed)


def visit(
    num_requests: int, seed: int = 0, model: str | None = None, memory: str = "96MiB", concurrency: int = 16
) -> BenchResult:
    """Start a server, visit it ``num_requests`` times and check the books.

    Args:
        num_requests: visits in all.
        seed: of lengths, kinds and moments.
        model: a model directory; None is the built-in model.
        memory: the server's budget.
        concurrency: clients at once.
    """
    machine = machine_info(probe=False)
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
    return BenchResult(name="http", machine=machine, rows=list(rows), claims=_claims(outcomes, leaked, exit_code))


def _claims(outcomes: Sequence[Outcome], leaked: int | None, exit_code: int) -> list[Claim]:
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


def _claim(name: str, value: int | None, unit: str, reason: str) -> Claim:
    return Claim(id=name, value=value, op="<=", target=0, unit=unit, low=value, high=value, reason=reason)


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
