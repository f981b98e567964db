"""Comparisons from the first method to the last: the gate, interruptions, failures; and the process of a method."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.cli import refused
from tests.support.compare import use_little_text
from tests.support.tiny_model import write_tiny_model

from elbowroom.commands import compare_process, compare_run
from elbowroom.commands.compare_child import Order, measure
from elbowroom.commands.compare_process import run_method
from elbowroom.commands.compare_run import CompareOptions, compare, open_comparison
from elbowroom.errors import ElbowroomError, RequestError
from elbowroom.evals.comparison import quality
from elbowroom.evals.comparison.plan import ComparePlan, parse_methods
from elbowroom.evals.comparison.table import Comparison
from elbowroom.evals.run_plan import RunPlan

Message = Mapping[str, object]
QUESTIONS = RunPlan(tasks=("retrieval", "chains"), context_tokens=256, num_queries=8, num_facts=2)
PLAN = ComparePlan(methods=parse_methods(["int8", "fp8"]), questions=QUESTIONS, num_windows=2, num_contexts=2)
QUICK = replace(PLAN, questions=replace(QUESTIONS, tasks=("retrieval",), num_queries=2), num_windows=0)
"""For tests of who is measured, and not of what is found."""
ORDER = Order(
    questions={},
    tasks=[],
    num_windows=0,
    num_contexts=1,
    kv="plain",
    out="nowhere",
    model=None,
    memory="1MiB",
    dtype="auto",
    retry_errors=False,
)


class Processes:
    """Measures in this process, and does something at the n-th message of a method."""

    def __init__(self, at: dict[tuple[str, str, int], BaseException] | None = None) -> None:
        self.at = at or {}
        self.labels: list[str] = []

    def __call__(self, order: Order, label: str, shown: bool) -> None:
        self.labels.append(label)
        counts: dict[str, int] = {}

        def tell(message: Message) -> None:
            stage = str(message["stage"])
            counts[stage] = counts.get(stage, 0) + 1
            error = self.at.get((label, stage, counts[stage]))
            if error is not None:
                raise error

        measure(order, tell)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    use_little_text(monkeypatch)


@pytest.fixture
def any_score_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers nothing; without the gate its zeros are compared."""
    monkeypatch.setattr(quality, "WEAK", 0.0)


def run(
    model: str,
    out: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    plan: ComparePlan = PLAN,
    **options: Any,
) -> Comparison:
    monkeypatch.setattr(compare_run, "run_method", processes)
    chosen = CompareOptions(model, "64MiB", "auto", progress=False, out=out, **options)
    with open_comparison(plan, chosen) as root:
        return compare(plan, chosen, root.path)


def answers(found: Comparison) -> list[dict[str, Any]]:
    """Return what must not depend on interruptions: all but speeds and peaks."""
    rows: list[dict[str, Any]] = found.to_json()["methods"]  # type: ignore[assignment]
    return [{key: each.get(key) for key in ("method", "kv", "error", "kv_bytes", "tasks", "failures")} for each in rows]


def test_tasks_that_dense_cannot_do_are_not_asked_of_others(model, tmp_path, monkeypatch):
    processes = Processes()
    found = run(model, tmp_path, processes, monkeypatch)
    assert processes.labels == ["plain", "int8", "fp8"]
    assert found.compared == ("perplexity",)
    assert set(found.weak) == {"retrieval", "chains"}
    assert all("dense too weak (0.0" in reason for reason in found.weak.values())
    assert all(set(row.qualities) == {"perplexity"} for row in found.rows)
    for row in found.rows:
        samples = tmp_path / "methods" / row.method.folder / "samples.jsonl"
        assert bool(samples.read_text()) is row.method.is_dense


def test_a_comparison_that_was_killed_goes_on_to_the_same_rows(model, tmp_path, monkeypatch, any_score_counts):
    whole = run(model, tmp_path / "whole", Processes(), monkeypatch)
    assert whole.compared == ("retrieval", "chains", "perplexity")
    killed = tmp_path / "killed"
    for at in (("plain", "asking", 3), ("plain", "perplexity", 2), ("int8", "measuring", 1), ("int8", "asking", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(model, killed, Processes({at: KeyboardInterrupt()}), monkeypatch)
        for samples in killed.glob("methods/*/samples.jsonl"):
            if not (samples.parent / "measured.json").exists():
                samples.write_bytes(samples.read_bytes()[:-7])  # what kill -9 leaves
    processes = Processes()
    again = run(model, killed, processes, monkeypatch)
    assert processes.labels == ["int8", "fp8"]
    assert answers(again) == answers(whole)
    finished = Processes()
    assert answers(run(model, killed, finished, monkeypatch)) == answers(whole)
    assert finished.labels == []


def test_methods_can_be_added_and_left_out(model, tmp_path, monkeypatch):
    fewer = replace(QUICK, methods=QUICK.methods[:2])
    assert len(run(model, tmp_path, Processes(), monkeypatch, fewer).rows) == 2
    processes = Processes()
    assert len(run(model, tmp_path, processes, monkeypatch, QUICK).rows) == 3
    assert processes.labels == ["fp8"]


def test_another_spec_is_refused_before_any_process(model, tmp_path, monkeypatch):
    with open_comparison(QUICK, CompareOptions(model, "64MiB", "auto", progress=False, out=tmp_path)):
        pass
    processes = Processes()
    with pytest.raises(RequestError, match="num_windows was 0, is 4") as found:
        run(model, tmp_path, processes, monkeypatch, replace(QUICK, num_windows=4))
    assert "--out" in (found.value.hint or "")
    assert processes.labels == []


def test_what_fails_with_a_method_is_its_row(model, tmp_path, monkeypatch):
    failing = Processes({("int8", "measuring", 1): ElbowroomError("int8: out of memory", "lower --memory")})
    found = run(model, tmp_path, failing, monkeypatch, QUICK)
    assert failing.labels == ["plain", "int8", "fp8"]
    assert [row.error for row in found.rows] == [None, "int8: out of memory (lower --memory)", None]
    assert found.rows[2].footprint is not None
    healed = Processes()
    assert run(model, tmp_path, healed, monkeypatch, QUICK).rows[1].error is None
    assert healed.labels == ["int8"]


def test_a_plan_that_does_not_suit_the_model_is_a_row(model, tmp_path, monkeypatch):
    plan = replace(QUICK, methods=parse_methods(["bfp(n=32)", "fp8"]))
    found = run(model, tmp_path, Processes(), monkeypatch, plan)
    assert "cannot cut heads of 16 channels" in (found.rows[1].error or "")
    assert found.rows[2].error is None


def test_without_the_control_there_is_no_comparison(model, tmp_path, monkeypatch):
    failing = Processes({("plain", "measuring", 1): ElbowroomError("plain: no")})
    with pytest.raises(ElbowroomError, match="plain: no"):
        run(model, tmp_path, failing, monkeypatch, QUICK)
    assert failing.labels == ["plain"]


def test_retry_errors_starts_every_process_again(model, tmp_path, monkeypatch):
    first = run(model, tmp_path, Processes(), monkeypatch, QUICK)
    processes = Processes()
    assert answers(run(model, tmp_path, processes, monkeypatch, QUICK, retry_errors=True)) == answers(first)
    assert processes.labels == ["plain", "int8", "fp8"]


def test_a_length_beyond_the_context_is_refused_at_once(model, tmp_path, monkeypatch):
    long = replace(QUICK, questions=replace(QUESTIONS, context_tokens=513))
    with pytest.raises(RequestError, match="--length 513 exceeds"):
        run(model, tmp_path / "new", Processes(), monkeypatch, long)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["int8", "zip(9)"], "choose one of: bfp"),
        (["plain"], "name KV plans"),
        (["int8", "int8()"], "the same KV plan"),
        (["int8", "--tasks", "piano"], "unknown task 'piano'"),
        (["int8", "--length", "5"], "128"),
        (["int8", "--equal", "taste"], "taste"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(compare_run, "run_method", None)
    assert words in refused(capsys, ["compare", *arguments], 2)


# The process of a method


def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "imagined_child.py").write_text("import json, os, signal, sys, time\n" + script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_method(ORDER, "int8", shown=False, module="imagined_child")


def test_a_process_that_ends_well_is_no_error(tmp_path, monkeypatch):
    script = "print('a library says hello'); print('{}'); print(json.dumps({'stage': 'asking', 'done': 1, 'total': 2}))"
    run_script(tmp_path, monkeypatch, script)


def test_an_error_that_is_told_keeps_its_hint_and_exit_code(tmp_path, monkeypatch):
    script = "print(json.dumps({'error': 'too small', 'hint': 'raise it', 'exit_code': 3})); sys.exit(3)"
    with pytest.raises(ElbowroomError, match="int8: too small") as found:
        run_script(tmp_path, monkeypatch, script)
    assert (found.value.hint, found.value.exit_code) == ("raise it", 3)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "as systems do when memory ends"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("raise MemoryError('no pages')", "failed: MemoryError: no pages"),
        ("sys.exit(7)", "exit code 7"),
    ],
)
def test_a_process_that_dies_says_how(tmp_path, monkeypatch, script, words):
    with pytest.raises(ElbowroomError, match=f"^int8: .*{words}"):
        run_script(tmp_path, monkeypatch, script)


def test_an_interrupt_ends_the_process(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"

    def interrupted(messages: Any, label: str, shown: bool) -> None:
        next(iter(messages))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_process, "follow", interrupted)
    script = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
    script += "print(json.dumps({'stage': 'asking', 'done': 1, 'total': 2}), flush=True); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_script(tmp_path, monkeypatch, script)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_bars_follow_the_stages(capsys: pytest.CaptureFixture[str]):
    stages: list[Message] = [{"stage": stage, "done": 1, "total": 2} for stage in ("loading", "asking", "asking")]
    failure = compare_process.follow([*map(dict, stages), {"error": "no", "hint": None}], "int8", shown=True)
    assert failure == {"error": "no", "hint": None}
    shown = capsys.readouterr().err
    assert "int8: loading" in shown
    assert "int8: asking" in shown


def test_an_order_reaches_the_process_unchanged():
    assert Order(**json.loads(json.dumps(ORDER.to_json()))) == ORDER
