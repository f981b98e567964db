"""What ``compare`` does: one process a method, the dense control first, in a directory from which all goes on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elbowroom.commands.compare_process import run_method
from elbowroom.errors import ElbowroomError, RequestError

if TYPE_CHECKING:
    from elbowroom.commands.compare_child import Order
    from elbowroom.evals.comparison.plan import ComparePlan, Method
    from elbowroom.evals.comparison.table import Comparison
    from elbowroom.evals.spec_directory import SpecDirectory


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Options of the command line beside the plan."""

    model: str | None
    memory: str
    dtype: str
    progress: bool | None
    out: Path | None = None
    retry_errors: bool = False


@contextmanager
def open_comparison(plan: ComparePlan, options: CompareOptions) -> Iterator[SpecDirectory]:
    """Yield the directory of the comparison; without ``--out`` one that is gone at the end of the block.

    Raises:
        RequestError: ``--length`` exceeds the model's context, or ``--out`` holds something else.
        ModelError: the model cannot be used.
    """
    from elbowroom.bench.machine import machine_info
    from elbowroom.commands.evaluate_run import describe_model
    from elbowroom.evals.spec_directory import SpecDirectory
    from elbowroom.models.directory import find_model
    from elbowroom.models.hf_config import read_config

    most, length = read_config(find_model(options.model)).max_positions, plan.questions.context_tokens
    if length > most:
        raise RequestError(f"--length {length} exceeds the model's context of {most} tokens", f"use --length {most}")
    spec = plan.to_json() | describe_model(options.model, options.dtype) | {"memory": options.memory}
    with tempfile.TemporaryDirectory() as scratch:
        yield SpecDirectory(options.out or Path(scratch) / "comparison", spec, machine_info(probe=False))


def compare(plan: ComparePlan, options: CompareOptions, root: Path) -> Comparison:
    """Measure every method of ``plan`` that is not measured yet, and return the comparison.

    Tasks that are too hard for the dense control are not asked of other methods.

    Raises:
        ElbowroomError: the control failed; what fails with another method becomes its row.
    """
    from elbowroom.evals.comparison.quality import read_runs, weak_tasks
    from elbowroom.evals.comparison.rows import method_directory, read_comparison

    dense, *others = plan.methods
    _measure(plan, dense, plan.questions.tasks, options, root)
    weak = weak_tasks(read_runs(method_directory(root, dense)))
    tasks = [task for task in plan.questions.tasks if task not in weak]
    errors: dict[Method, str] = {}
    for method in others:
        try:
            _measure(plan, method, tasks, options, root)
        except ElbowroomError as error:
            errors[method] = error.message if error.hint is None else f"{error.message} ({error.hint})"
    return read_comparison(root, plan, errors)


def _measure(plan: ComparePlan, method: Method, tasks: Sequence[str], options: CompareOptions, root: Path) -> None:
    """Run the process of ``method``, unless its directory says that there is nothing left to do."""
    from elbowroom.commands.terminal import wants_progress

    order = _order(plan, method, tasks, options, root)
    if options.retry_errors or not _is_measured(order):
        run_method(order, method.label, wants_progress(options.progress))


def _order(plan: ComparePlan, method: Method, tasks: Sequence[str], options: CompareOptions, root: Path) -> Order:
    from elbowroom.commands.compare_child import Order
    from elbowroom.evals.comparison.plan import plan_to_json
    from elbowroom.evals.comparison.rows import method_directory

    return Order(
        questions=plan_to_json(plan.questions),
        tasks=list(tasks),
        num_windows=plan.num_windows,
        num_contexts=plan.num_contexts,
        kv=method.kv,
        out=str(method_directory(root, method)),
        model=options.model,
        memory=options.memory,
        dtype=options.dtype,
        retry_errors=options.retry_errors,
    )


def _is_measured(order: Order) -> bool:
    path = Path(order.out) / "measured.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == order.measured()
