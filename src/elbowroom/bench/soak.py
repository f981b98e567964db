"""soak: 1,000 requests of several tenants through overload and a restart: nothing accepted is lost, nothing leaks.

A server on the built-in model, with a short queue and three tenants, gets valid requests by the official client,
streams that are left early, sockets that close at random moments and malformed bodies, from more clients than it takes;
those who get 429 come again when told. In the middle it gets SIGTERM, and another one takes its port. Claims: no 5xx
but the 503 of the server that drains, no reset, no hang, no answer that breaks the schema, nothing cut off, both exits
0; and at the end, caches emptied, the books agree and every owner holds what it held at the start. Then another server
is tested by its own schema (``soak_schema``).
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from elbowroom.bench.base import BenchOptions, BenchResult, Claim
from elbowroom.bench.http import leaked_strips, server
from elbowroom.bench.http_visitor import HANG_S, KINDS, Outcome
from elbowroom.bench.machine import machine_info
from elbowroom.bench.soak_schema import measure_schema
from elbowroom.bench.soak_visitor import Town
from elbowroom.errors import ElbowroomError
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config

KEYS = {"key-of-oak": "oak", "key-of-elm": "elm 2", "key-of-ash": "ash"}
"""API key -> tenant and weight."""
OPTIONS = (
    "--max-sequences", "8", "--max-queue", "10", "--max-queue-per-tenant", "4", "--drain-timeout", "40",
    "--debug-routes",
)  # fmt: skip


def run(options: BenchOptions) -> BenchResult:
    """Send 1,000 requests (quick: 60), then test by the schema for 60 s (quick: 8)."""
    visited = soak(num_requests=60 if options.quick else 1000, seed=options.seed)
    rows, claim = by_schema(seconds=8.0 if options.quick else 60.0, seed=options.seed)
    return replace(visited, rows=[*visited.rows, *rows], claims=[*visited.claims, claim])


def by_schema(seconds: float, seed: int = 0, model: str | None = None) -> tuple[list[Mapping[str, object]], Claim]:
    """Test a server of several tenants by its schema for ``seconds``; return rows and the claim ``soak.schema``."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = _arguments(Path(directory))
        return measure_schema(seconds, seed, next(iter(KEYS)), arguments, lambda url: _flat(_reset(url)), model)


def _arguments(directory: Path) -> tuple[str, ...]:
    """Return the servers' options, with a file of keys that is written to ``directory``."""
    keys = directory / "keys"
    keys.write_text("".join(f"{key} {tenant}\n" for key, tenant in KEYS.items()))
    return (*OPTIONS, "--api-key-file", str(keys))


def soak(
    num_requests: int, seed: int = 0, model: str | None = None, memory: str = "64MiB", concurrency: int = 32
) -> BenchResult:
    """Start a server, visit it ``num_requests`` times, replace it in the middle, and check the books of the second.

    Args:
        num_requests: visits in all.
        seed: of lengths, kinds and moments.
        model: a model directory; None is the built-in model.
        memory: the servers' budget.
        concurrency: clients at once; the server takes 8 and lets 10 wait.
    """
    machine, rng = machine_info(probe=False), random.Random(seed)
    kinds = rng.choices(list(KINDS), weights=list(KINDS.values()), k=num_requests)
    num_layers = len(read_config(find_model(model)).layers)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(concurrency) as pool:
        arguments = _arguments(Path(directory))
        with server(model, memory, options=arguments) as (first, url):
            town = Town(url, "builtin" if model is None else "bench", list(KEYS))
            started, ended = time.perf_counter(), _Count()
            visits = [
                pool.submit(ended.counted, town.visit, kind, seed * 1_000_003 + i) for i, kind in enumerate(kinds)
            ]
            ended.wait_for(num_requests // 2)
            town.is_away.set()
            first.send_signal(signal.SIGTERM)
            drained_s, last_words = _ended(first)
            town.is_open.clear()  # what the second one holds is read before anybody comes
        with server(model, memory, port=int(url.rpartition(":")[2]), options=arguments) as (second, _):
            held_before = _reset(url)
            town.is_away.clear()
            town.is_open.set()
            outcomes = [visit.result() for visit in visits]
            elapsed = time.perf_counter() - started
            strips, held_after = leaked_strips(url, num_layers), _reset(url)
            second.send_signal(signal.SIGTERM)
            _ended(second)
    rows = _rows(outcomes, town)
    rows.append({"row": "servers", "seconds": elapsed, "drain_s": drained_s, "memory": memory, "said": last_words})
    errors = _errors(outcomes, (first, second), last_words)
    leaks = _leaks(held_before, held_after, strips)
    return BenchResult(name="soak", machine=machine, rows=rows, claims=[errors, leaks])


class _Count:
    """Counts visits that ended."""

    def __init__(self) -> None:
        self._num, self._changed = 0, threading.Condition()

    def counted(self, visit: Any, *arguments: Any) -> Any:
        """Make a visit and count it."""
        outcome = visit(*arguments)
        with self._changed:
            self._num += 1
            self._changed.notify()
        return outcome

    def wait_for(self, num: int) -> None:
        """Wait until so many have ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._num >= num)


def _ended(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Wait for a server that was told to end; return the seconds that took, and what it said."""
    started = time.perf_counter()
    assert process.stdout is not None
    said = " ".join(process.stdout.read().split())
    process.wait(HANG_S)
    return time.perf_counter() - started, said


def _reset(url: str) -> Mapping[str, Any]:
    """Empty the server's caches and return what each of its models holds then; its own check of the books passed."""
    answer = httpx.post(f"{url}/debug/reset", headers={"Authorization": f"Bearer {next(iter(KEYS))}"}, timeout=HANG_S)
    if answer.status_code != 200:
        raise ElbowroomError(f"the server's books do not agree: {answer.text}", "read what it wrote above")
    held: Mapping[str, Any] = answer.json()
    return held


def _errors(outcomes: Sequence[Outcome], servers: Sequence[subprocess.Popen[str]], last_words: str) -> Claim:
    faults = Counter(f"{outcome.kind}: {outcome.fault}" for outcome in outcomes if outcome.fault)
    faults.update(f"a server ended with code {each.returncode}" for each in servers if each.returncode)
    cut = re.search(r"(\d+) were cut off", last_words)
    faults["accepted and cut off"] += int(cut[1]) if cut else 0
    faults = +faults
    listed = "; ".join(f"{count} x {what}" for what, count in faults.most_common(5))
    reason = listed or f"{len(outcomes)} visits, each answered or refused as documented"
    return _claim("soak.errors", faults.total(), "errors", reason)


def _leaks(before: Mapping[str, Any], after: Mapping[str, Any], strips: int | None) -> Claim:
    if strips is None:
        return _claim("soak.leaks", None, "bytes", "something still runs 10 s after the last visit")
    was, now = _flat(before), _flat(after)
    moved = {name: now.get(name, 0) - was.get(name, 0) for name in was | now}
    moved = {name: change for name, change in moved.items() if change}
    listed = ", ".join(f"{name} {change:+}" for name, change in moved.items())
    reason = listed or f"{len(was)} counts of the store and of owners in the ledger are what they were"
    return _claim("soak.leaks", sum(map(abs, moved.values())) + strips, "bytes", reason)


def _flat(held: Mapping[str, Any]) -> dict[str, int]:
    """Return what models hold, by name; peaks are no leaks."""
    made: dict[str, int] = {}
    for model, parts in held.items():
        made |= {f"{model} kv {name}": count for name, count in parts["kv"].items()}
        for owner, tiers in parts["ledger"].items():
            made |= {f"{model} {owner} {tier}": usage["current_bytes"] for tier, usage in tiers.items()}
    return made


def _claim(name: str, value: int | None, unit: str, reason: str) -> Claim:
    return Claim(id=name, value=value, op="<=", target=0, unit=unit, low=value, high=value, reason=reason)


def _rows(outcomes: Sequence[Outcome], town: Town) -> list[Mapping[str, object]]:
    counts, faults = Counter(each.kind for each in outcomes), Counter(each.kind for each in outcomes if each.fault)
    rows: list[Mapping[str, object]] = [
        {"row": kind, "count": count, "faults": faults[kind]} for kind, count in sorted(counts.items())
    ]
    rows += [{"row": f"told to wait: {reason}", "count": count} for reason, count in sorted(town.waits.items())]
    sys.stderr.write(f"{len(outcomes)} visits, told to wait {town.waits.total()} times\n")
    return rows
