"""The part of ``soak`` in which schemathesis reads the schema of a running server and sends what it allows and forbids.

The server has a copy of the model with a short context, so that requests without ``max_tokens`` end soon and many fit
into the time. schemathesis runs as a process of its own, with a fixed seed and every check; a valid request may also
get 400, since a schema cannot say what depends on the model or on other fields. What it finds, and what the server
still holds afterwards beyond what it held before, is the claim ``soak.schema``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from elbowroom.bench.base import Claim, Row
from elbowroom.bench.http import leaked_strips, server
from elbowroom.bench.http_visitor import HANG_S
from elbowroom.errors import ElbowroomError
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config

PACKAGE = "schemathesis"
MISSING = f"{PACKAGE} is not installed: `make bench` installs it"
CONTEXT = 256
"""Tokens of the model's context; its answers end there."""
_STARTS_S = 120.0
"""Time for the process beyond that of its tests: it imports, reads the schema and writes its report."""
_SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 404, 429]
"""
GENERATING = ("/v1/completions", "/v1/chat/completions")
_COUNTED = re.compile(r'^elbowroom_http_requests_total\{code="(\d+)",route="([^"]+)"\} (\S+)$', re.MULTILINE)


def is_installed() -> bool:
    """Return whether schemathesis is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def measure_schema(
    seconds: float,
    seed: int,
    key: str,
    options: tuple[str, ...],
    held: Callable[[str], Mapping[str, int]],
    model: str | None = None,
) -> tuple[list[Row], Claim]:
    """Test a server by its schema and return rows and the claim ``soak.schema``.

    Args:
        seconds: how long schemathesis sends requests.
        seed: of what it makes.
        key: an API key that the server knows.
        options: of the server.
        held: empties the caches of the server at a URL and returns what it still holds, by name.
        model: a model directory; None is the built-in model.
    """
    if not is_installed():
        return [], claim(None, MISSING)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        short = with_short_context(find_model(model), directory / "model")
        num_layers = len(read_config(short).layers)
        with server(str(short), "64MiB", options=options) as (process, url):
            before = held(url)
            report = _report(url, seconds, seed, key, directory)
            answers = read_answers(httpx.get(f"{url}/metrics", timeout=HANG_S).text)
            strips, after = leaked_strips(url, num_layers), held(url)
            process.send_signal(signal.SIGTERM)
            exit_code = process.wait(HANG_S)
    rows, failures, reason = read_report(report, answers)
    if failures is None:
        return rows, claim(None, reason)
    moved = {name: after.get(name, 0) - before.get(name, 0) for name in {**before, **after}}
    faults = [f"{name} {change:+}" for name, change in moved.items() if change]
    faults += ["something still runs 10 s after the last request"] if strips is None else []
    faults += [f"{strips} strips beyond the prefix cache"] if strips else []
    faults += [f"the server ended with code {exit_code}"] if exit_code else []
    return rows, claim(failures + len(faults), "; ".join([reason, *faults]))


def with_short_context(model: Path, directory: Path) -> Path:
    """Copy a model's directory to ``directory``, with a context of ``CONTEXT`` tokens."""
    shutil.copytree(model, directory)
    config = directory / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"max_position_embeddings": CONTEXT}))
    return directory


def read_answers(metrics: str) -> Counter[tuple[str, str]]:
    """Return how often the server gave which status, by route and status, from the text of its metrics."""
    return Counter({(route, status): int(float(count)) for status, route, count in _COUNTED.findall(metrics)})


def read_report(report: Mapping[str, Any], answers: Mapping[tuple[str, str], int]) -> tuple[list[Row], int | None, str]:
    """Return rows, the number of failures and what they are, from schemathesis' report in JSON and ``read_answers``.

    The number is None, and the reason says why, if the run ended early or did not reach all that it was to test.
    """
    operations, cases = report["operations"], report["test_cases"]
    rows: list[Row] = [
        {"row": f"schema: {route}", "status": status, "count": count}
        for (route, status), count in sorted(answers.items())
    ]
    counted = {"seconds": report["running_time"], "seed": report["seed"], "stop_reason": report["stop_reason"]}
    rows.append({"row": "schema", "operations": operations["tested"], "cases": cases["generated"], **counted})
    found = [f"{each['count']} x {each['title']} ({', '.join(each['operations'])})" for each in report["failures"]]
    found += [f"error: {_said(each)}" for each in report["errors"]]
    failures = sum(each["count"] for each in report["failures"]) + len(report["errors"])
    unreached = [route for route in GENERATING if not answers.get((route, "200"))]
    if not failures and (not report["complete"] or operations["tested"] < operations["selected"] or unreached):
        tested = f"{operations['tested']} of {operations['selected']} operations were tested"
        idle = f"; nothing was generated by {', '.join(unreached)}" if unreached else ""
        return rows, None, f"the run proves nothing: {tested}{idle}"
    most = f"{cases['generated']} cases of {operations['tested']} operations as the schema says"
    return rows, failures, "; ".join(found[:5]) or most


def claim(value: int | None, reason: str) -> Claim:
    """Return the claim."""
    return Claim(
        id="soak.schema", value=value, op="<=", target=0, unit="failures", low=value, high=value, reason=reason
    )


def _said(error: Any) -> str:
    """Return one line about an error of the tool itself, whatever it holds."""
    text = " ".join(json.dumps(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def _report(url: str, seconds: float, seed: int, key: str, directory: Path) -> Mapping[str, Any]:
    settings, report = directory / "schemathesis.toml", directory / "report.json"
    settings.write_text(_SETTINGS)
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", f"{url}/openapi.json",
        "--header", f"Authorization: Bearer {key}", "--seed", str(seed), "--max-time", str(max(1, round(seconds))),
        "--checks", "all", "--phases", "coverage,fuzzing", "--max-examples", "40", "--continue-on-failure",
        "--no-shrink", "--request-timeout", str(HANG_S), "--report-json-path", str(report), "--no-color",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=seconds + _STARTS_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ElbowroomError(f"{PACKAGE} did not end", "run it by hand on the server's /openapi.json") from None
    if not report.is_file():
        said = (done.stdout + done.stderr)[-2000:]
        raise ElbowroomError(f"{PACKAGE} ended with code {done.returncode} and no report: {said}")
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:])
    made: Mapping[str, Any] = json.loads(report.read_text())
    return made
