"""Comparisons on paper: plans, the gate, paired differences, rankings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.compare import comparison, footprint, task_run, write_run

from elbowroom.errors import PlanError, RequestError
from elbowroom.evals.comparison.plan import (
    ComparePlan,
    Method,
    parse_compared_tasks,
    parse_methods,
    plan_from_json,
    plan_to_json,
)
from elbowroom.evals.comparison.quality import TaskRun, quality, weak_tasks
from elbowroom.evals.comparison.ranking import rank
from elbowroom.evals.comparison.rows import method_directory, read_comparison
from elbowroom.evals.comparison.table import MethodRow
from elbowroom.evals.run_plan import RunPlan

QUESTIONS = RunPlan(tasks=("kv", "mf"), context_tokens=256, num_queries=4)


def test_dense_comes_first_and_once():
    assert [method.label for method in parse_methods(["int8", "plain", "bfp"])] == ["plain", "int8", "bfp"]
    assert parse_methods(["int8"])[0].is_dense
    assert not Method.parse("plain(bf16)").is_dense


@pytest.mark.parametrize(
    ("texts", "words"), [(["plain"], "nothing to compare"), (["bfp", "int8", "bfp(n=32,k=4)"], "the same KV plan")]
)
def test_methods_that_compare_nothing_are_refused(texts: list[str], words: str):
    with pytest.raises(RequestError, match=words):
        parse_methods(texts)


def test_a_plan_has_one_directory_however_it_is_spelled():
    folders = [Method.parse(text).folder for text in ("kivi(2,2,64)", "kivi(g=64, k=2, v=2)", "kivi(2,2,32)")]
    assert folders[0] == folders[1] != folders[2]
    assert all(set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for folder in folders)


def test_perplexity_stands_among_tasks():
    assert parse_compared_tasks("kv, perplexity,mf") == (("kv", "mf"), True)
    assert parse_compared_tasks("perplexity") == ((), True)
    assert parse_compared_tasks("kv") == (("kv",), False)
    tasks, has_perplexity = parse_compared_tasks("all")
    assert has_perplexity
    assert "vt" in tasks


@pytest.mark.parametrize("text", ["perplexity,perplexity", "kv,kv", "", "kv,,perplexity"])
def test_lists_of_tasks_that_make_no_sense_are_refused(text: str):
    with pytest.raises(RequestError, match="--tasks"):
        parse_compared_tasks(text)


def test_an_unknown_task_is_refused():
    with pytest.raises(PlanError, match="unknown task 'piano'"):
        parse_compared_tasks("piano,perplexity")


def test_a_plan_reaches_another_process_unchanged():
    assert plan_from_json(json.loads(json.dumps(plan_to_json(QUESTIONS)))) == QUESTIONS


def test_a_task_below_the_bar_is_weak_and_its_score_is_not_rounded_up_to_it():
    runs = {
        "at": task_run(*[1.0] * 19, 0.0),
        "below": task_run(*[1.0] * 18, 0.98, 0.0),
        "failed": TaskRun({("s", 0): 1.0}, 3, "too long"),
        "perplexity": task_run(0.4, 0.5),
    }
    assert weak_tasks(runs) == {
        "below": "dense too weak (0.94): no comparison",
        "failed": "3 questions failed with dense attention: too long",
    }


def test_differences_are_paired():
    dense = task_run(*[float(number % 2) for number in range(40)])
    worse = TaskRun(dense.scores | {("s", 1): 0.0, ("s", 3): 0.0})
    found = quality("kv", worse, dense)
    assert found.difference == pytest.approx(-0.05)
    assert (found.num_better, found.num_worse, found.num_items) == (0, 2, 40)
    assert found.difference_interval is not None
    low, high = found.difference_interval
    assert -0.2 < low <= -0.05 <= high <= 0.0
    # Pairing is what makes it narrow: the intervals of the two means overlap widely.
    assert high - low < (found.interval[1] - found.interval[0]) / 2


def test_fewer_bits_are_better():
    found = quality("perplexity", task_run(0.9, 1.0, 1.3), task_run(1.0, 1.0, 1.0))
    assert (found.num_better, found.num_worse) == (1, 1)


def test_equal_bytes_are_those_within_five_percent_and_the_best_comes_first():
    found = comparison({"int8": (500, 0.9, 1.1), "fp8": (520, 1.0, 1.2), "bfp": (530, 1.0, 1.3)})
    by_task = {
        task: [each.methods for each in rank(found, "bytes") if each.task == task] for task in ("kv", "perplexity")
    }
    assert by_task["kv"] == [("fp8", "int8"), ("bfp",), ("plain",)]
    assert by_task["perplexity"] == [("int8", "fp8"), ("bfp",), ("plain",)]


def test_equal_quality_drops_what_is_surely_worse_and_puts_few_bytes_first():
    found = comparison({"int8": (500, 1.0, 0.9), "fp8": (520, 0.5, 1.0), "bfp": (250, 0.975, 1.5)})
    kv, perplexity = rank(found, "quality")
    assert (kv.methods, kv.dropped) == (("bfp", "int8", "plain"), ("fp8",))
    assert (perplexity.methods, perplexity.dropped) == (("int8", "fp8", "plain"), ("bfp",))


def test_a_task_that_is_too_hard_is_ranked_nowhere():
    found = comparison({"int8": (500, 1.0, 1.0)}, {"mf": "dense too weak (0.10): no comparison"})
    assert {each.task for each in rank(found, "bytes")} == {"kv", "perplexity"}


@pytest.mark.parametrize(("num_bytes", "inactive"), [(979, False), (980, True), (1200, True)])
def test_a_method_that_saves_nothing_is_inactive(num_bytes: int, inactive: bool):
    assert MethodRow(Method.parse("int8"), footprint(num_bytes)).inactive(1000) is inactive
    assert not MethodRow(Method.parse("plain"), footprint(num_bytes)).inactive(1000)


def compared(root: Path, **runs: tuple[dict[str, list[float | str]], list[float]]):
    plan = ComparePlan(methods=parse_methods(["int8", "fp8"]), questions=QUESTIONS, num_windows=2)
    for method in plan.methods:
        if method.label in runs:
            write_run(method_directory(root, method), *runs[method.label])
    errors = {method: f"{method.label}: gone" for method in plan.methods if method.label not in runs}
    return read_comparison(root, plan, errors)


def test_rows_are_read_from_directories(tmp_path: Path):
    good: list[float | str] = [1.0, 1.0, 1.0, 1.0]
    found = compared(
        tmp_path,
        plain=({"kv": good, "mf": [1.0, 0.0, 1.0, 1.0]}, [1.0, 1.2]),
        int8=({"kv": [1.0, 0.0, 1.0, 1.0]}, [1.1, 1.2]),
    )
    assert found.compared == ("kv", "perplexity")
    assert "0.75" in found.weak["mf"]
    dense, int8, fp8 = found.rows
    assert dense.qualities["kv"].difference is None
    assert int8.qualities["kv"].difference == -0.25
    assert int8.qualities["perplexity"].difference == pytest.approx(0.05)
    assert fp8.error == "fp8: gone"
    said = found.to_json()
    assert "mf" not in said["methods"][0]["tasks"]
    assert said["tasks"]["mf"]["compared"] is False
    assert said["methods"][2] == {"method": "fp8", "kv": Method.parse("fp8").kv, "error": "fp8: gone"}


def test_questions_that_failed_leave_no_number(tmp_path: Path):
    good: list[float | str] = [1.0, 1.0]
    found = compared(
        tmp_path,
        plain=({"kv": good, "mf": good}, [1.0, 1.0]),
        int8=({"kv": [1.0, "too large"], "mf": good[:1]}, [1.0]),
        fp8=({"kv": good, "mf": good}, [1.0, 1.0]),
    )
    _, int8, fp8 = found.rows
    assert int8.qualities == {}
    assert int8.failures["kv"] == "1 of 2 questions failed: too large"
    assert "cannot be paired" in int8.failures["mf"]
    assert "cannot be paired" in int8.failures["perplexity"]
    assert set(fp8.qualities) == {"kv", "mf", "perplexity"}


def test_the_spec_does_not_name_methods():
    plan = ComparePlan(methods=parse_methods(["int8"]), questions=QUESTIONS)
    assert plan.to_json() == replace(plan, methods=parse_methods(["fp8"])).to_json()
    assert plan.to_json() != replace(plan, num_contexts=9).to_json()
