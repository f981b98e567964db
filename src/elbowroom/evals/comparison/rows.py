"""From the directories of all methods to the rows of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elbowroom.errors import RequestError
from elbowroom.evals.comparison.plan import ComparePlan, Method
from elbowroom.evals.comparison.quality import Quality, TaskRun, quality, read_runs, weak_tasks
from elbowroom.evals.comparison.table import Comparison, Footprint, MethodRow

METHODS = "methods"
"""Folder of the methods' directories."""


def method_directory(root: Path, method: Method) -> Path:
    """Return where the results of ``method`` are."""
    return root / METHODS / method.folder


def read_comparison(root: Path, plan: ComparePlan, errors: Mapping[Method, str]) -> Comparison:
    """Return the comparison of all methods of ``plan``.

    Args:
        root: directory of the comparison, in which the dense control is complete.
        plan: methods and tasks.
        errors: why methods have no row.
    """
    runs = read_runs(method_directory(root, plan.methods[0]))
    control = {task: runs.get(task, TaskRun({})) for task in plan.tasks}
    weak = weak_tasks(control)
    tasks = [task for task in plan.tasks if task not in weak]
    rows = [_row(root, method, tasks, control, errors.get(method)) for method in plan.methods]
    return Comparison(tuple(rows), plan.tasks, weak)


def _row(
    root: Path, method: Method, tasks: Sequence[str], control: Mapping[str, TaskRun], error: str | None
) -> MethodRow:
    if error is not None:
        return MethodRow(method, error=error)
    directory = method_directory(root, method)
    runs = read_runs(directory)
    qualities: dict[str, Quality] = {}
    failures: dict[str, str] = {}
    for task in tasks:
        run = runs.get(task, TaskRun({}))
        if run.num_errors:
            failures[task] = f"{run.num_errors} of {run.num_errors + len(run.scores)} questions failed: {run.error}"
            continue
        try:
            qualities[task] = quality(task, run, None if method.is_dense else control[task])
        except RequestError as reason:
            failures[task] = reason.message
    return MethodRow(method, _footprint(directory / "footprint.json"), qualities, failures)


def _footprint(path: Path) -> Footprint:
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    fields |= {name: tuple(fields[name]) for name in ("prefill_range", "decode_range")}
    return Footprint(**fields)
