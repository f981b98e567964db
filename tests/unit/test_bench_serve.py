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
    """0.7 of what lives at a time, 128 KiB a token, and no less than the longest request needs at its limit."""
    tokens = []
    for count in (5, 40):
        words = ["--trace", str(trace), "--simulate", "--json", "--requests", str(count)]
        assert invoke(["bench", "serve", *words]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert {(row["num_requests"], row["num_failed"]) for row in rows} == {(count, 0)}
        tokens.append(rows[0]["kv_bytes"] / 2**17)
    assert tokens[0] == -(-(104 + 4096) // 64) * 64
    assert 40 * 100 < tokens[1] / 0.7 < 40 * 540


def test_all_combinations_of_policies_are_compared(trace: Path, tmp_path: Path, capsys) -> None:
    """What is saved is priced, over a link or as the directory is measured; recomputing writes nothing."""
    words = ["--policy", "greedy", "--order", "fcfs", "--order", "fair", "--preemption", "recompute"]
    words += ["--preemption", "swap", "--memory", "1GiB", "--simulate", "--json", "--trace", str(trace)]
    assert invoke(["bench", "serve", *words, "--swap", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["order"], row["preemption"]) for row in rows] == [
        ("fcfs", "recompute"),
        ("fcfs", "swap"),
        ("fair", "recompute"),
        ("fair", "swap"),
    ]
    for row in rows:
        assert (row["swapped_bytes"] > 0) == (row["preemption"] == "swap")
        assert (row["recomputed_tokens"] > 0) == (row["preemption"] == "recompute")
        assert row["first_failure"] is None


def test_requests_that_never_fit_are_counted_and_explained(trace: Path, capsys) -> None:
    assert invoke(["bench", "serve", "--trace", str(trace), "--simulate", "--json", "--memory", "64MiB"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["num_failed"] == 40
    assert "64.0 MiB are there" in row["first_failure"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "--rate must be a number above 0"),
        (["--gap", "-1"], "--gap must be a number above 0"),
        (["--swap", "nowhere"], "no directory"),
        (["--order", "alphabet"], "choose one of: fair, fcfs, priority, slo"),
        (["--preemption", "swap"], "--swap DIR"),
    ],
)
def test_what_cannot_be_meant_is_refused(trace: Path, capsys, words: list[str], message: str) -> None:
    simulate = [] if "--preemption" in words else ["--simulate"]
    assert invoke(["bench", "serve", "--trace", str(trace), *simulate, *words]) == 2
    assert message in capsys.readouterr().err


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
