"""``elbowroom bench serve``: options, rows and the report, simulated; the claims of serve-admission from made cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elbowroom.bench.serve_admission import POLICIES, Cell, _claims
from elbowroom.commands import invoke
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.metrics import RequestTimes, RunRecord, RunSummary, Targets

COLUMNS = "policy", "goodput", "evictions", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "peak_kv_bytes"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A load that outgrows the memory of greedy's run."""
    path = tmp_path / "trace.jsonl"
    Workload("w", tuple(TimedRequest(0.05 * i, 100 + i, 400) for i in range(40))).save(path)
    return path


def test_rows_have_their_columns_and_the_report_its_pictures(trace: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "report.html"
    words = ["--policy", "greedy", "--policy", "oracle", "--memory", "1GiB", "--report", str(page)]
    assert invoke(["bench", "serve", "--trace", str(trace), "--simulate", "--json", *words]) == 0
    greedy, oracle = json.loads(capsys.readouterr().out)["rows"]
    assert all(name in row for name in COLUMNS for row in (greedy, oracle))
    assert greedy["policy"] == "greedy"
    assert greedy["evictions"] > 0 == oracle["evictions"]
    assert greedy["peak_kv_bytes"] <= greedy["kv_bytes"] == 2**30
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 8
    assert "memory by owner" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_memory_is_derived_from_the_trace(trace: Path, capsys) -> None:
    assert invoke(["bench", "serve", "--trace", str(trace), "--simulate", "--json", "--requests", "5"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["num_requests"] for row in rows} == {5}
    # Five requests of 100 to 504 tokens: 0.7 of what they hold together, of 128 KiB a token.
    assert 5 * 100 < rows[0]["kv_bytes"] / 2**17 / 0.7 < 5 * 504


def test_options_of_serve_are_refused_elsewhere(trace: Path, capsys) -> None:
    assert invoke(["bench", "relief", "--trace", str(trace)]) == 2
    assert "elbowroom bench serve" in capsys.readouterr().err


def summary(good: int, evictions: int) -> RunSummary:
    times = []
    for number in range(10):
        each = RequestTimes(TimedRequest(0.0, 1, 1), has_ended=True)
        each.add([1.0 if number < good else 100.0])
        times.append(each)
    return RunRecord(requests=times, evictions=evictions).summary(Targets())


def test_claims_are_those_of_the_worst_cell_and_few_evictions_are_void() -> None:
    def cell(load: str, good: int, before: int, after: int) -> Cell:
        runs = {policy: [summary(8, before)] for policy in POLICIES}
        return Cell(load, 0.5, runs | {"past_future": [summary(good, after)]})

    goodput, evictions, seconds = _claims([cell("a", 8, 40, 4), cell("b", 6, 19, 19)], {"greedy": 3.0})
    assert (goodput.value, goodput.holds) == (0.75, False)
    assert (evictions.value, evictions.holds) == (0.1, True)
    assert "b 0.5 (19 evictions)" in evictions.reason
    assert seconds.holds
    assert _claims([cell("b", 6, 19, 19)], {})[1].value is None
