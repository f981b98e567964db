"""Reports of evaluations: JSON objects, a table of tasks, lines by depth and by turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from elbowroom.commands.evaluate_run import Measured
    from elbowroom.evals.retrieval import Bin
    from elbowroom.evals.run_plan import RunPlan


_WHOLE = ("task", "95% interval")
"""Columns that are never folded."""


def run_to_json(plan: RunPlan, measured: Measured) -> dict[str, object]:
    """Return the object that ``eval run --json`` prints."""
    controls = {name: result.to_json() for name, result in measured.controls.items()}
    return {"plan": plan.to_json()} | measured.summary() | {"controls": controls} | measured.report.to_json()


def print_run(plan: RunPlan, measured: Measured) -> None:
    """Print a table of all tasks, what the controls said, and the memory."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("task", "questions", "score", "95% interval", "tenth", "turn 1", "last", "errors"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=name in _WHOLE)
    for name, result in measured.results.items():
        low, high = result.interval
        table.add_row(
            name,
            str(result.num_queries),
            f"{result.accuracy:.3f}" if result.num_queries else "none",
            f"{low:.2f}-{high:.2f}",
            _share(result.lowest_decile()),
            _share(result.by_turn[0].accuracy) if result.by_turn else "",
            _share(result.by_turn[-1].accuracy) if result.by_turn else "",
            str(result.num_errors),
        )
    typer.echo(f"{plan.context_tokens} tokens, seed {plan.seed}")
    Console().print(table)
    _print_errors(measured)
    for name, control in measured.controls.items():
        typer.echo(
            f"controls of {name}, {control.num_queries} questions: references {control.oracle:.3f}, "
            f"without context {control.null:.3f}, {control.num_differing} replies differ when asked again"
        )
    measured.report.print()


def retrieval_to_json(plan: RunPlan, measured: Measured) -> dict[str, object]:
    """Return the object that ``eval retrieval --json`` prints."""
    result = measured.results["retrieval"]
    head = {"task": "retrieval", "length": plan.context_tokens, "keys": plan.num_facts, "seed": plan.seed}
    return head | result.to_json() | {"lowest_decile": result.lowest_decile()} | measured.report.to_json()


def print_retrieval(plan: RunPlan, measured: Measured) -> None:
    """Print the share of exact answers, also by depth, and the memory."""
    result = measured.results["retrieval"]
    low, high = result.interval
    typer.echo(
        f"retrieval, {plan.context_tokens} tokens, {plan.num_facts} facts each: "
        f"{result.num_correct} of {result.num_queries} exact ({result.accuracy:.1%}; "
        f"95% interval {low:.1%} to {high:.1%})"
    )
    _print_depths(result.by_depth)
    _print_errors(measured)
    measured.report.print()


def _print_depths(bins: Sequence[Bin]) -> None:
    for index, part in enumerate(bins):
        share = "no questions" if part.accuracy is None else f"{part.accuracy:.1%} of {part.num_queries}"
        typer.echo(f"  depth {index * 10:3d}-{index * 10 + 10}%  {share}")


def _print_errors(measured: Measured) -> None:
    for name, result in measured.results.items():
        if result.num_errors:
            typer.echo(f"{name}: {result.num_errors} questions failed and count nowhere: {'; '.join(result.errors)}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
