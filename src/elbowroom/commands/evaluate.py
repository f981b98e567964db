"""``elbowroom eval``: how well a model uses its context inside a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from elbowroom.commands.options import KV, Dtype, Json, Memory, Model, Progress

Length = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens of each context, with its questions and answers.")
]
Queries = Annotated[int, typer.Option(metavar="N", min=1, help="Questions in all, at least.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the contexts.")]

app = typer.Typer(help="Measure how well a model uses its context inside a memory budget.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure how well a model uses its context inside a memory budget."""


@app.command("list")
def list_tasks(json: Json = False) -> None:
    """Show the tasks that `eval run` knows, one a line."""
    from elbowroom.commands.terminal import print_json
    from elbowroom.evals.tasks import TASKS

    tasks = {name: TASKS.get(name) for name in TASKS.names()}
    if json:
        print_json({name: {"asks": task.asks, "mode": task.mode} for name, task in tasks.items()})
    else:
        for name, task in tasks.items():
            typer.echo(f"{name:16} {task.asks}")


@app.command("run")
def run(
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks, as in retrieval,kv; all means every task.")],
    model: Model = None,
    length: Length = 1024,
    keys: Annotated[int, typer.Option(metavar="K", min=1, help="Questions about each context.")] = 1,
    hops: Annotated[int, typer.Option(metavar="N", min=1, help="Links of a chain in the task chains.")] = 1,
    num_queries: Annotated[int, typer.Option(metavar="N", min=1, help="Questions of each task, at least.")] = 400,
    mode: Annotated[
        Literal["multi_turn", "multi_request"] | None,
        typer.Option(
            help="multi_turn: questions follow each other in one session; multi_request: each has its own fork of "
            "the context. By default as the task does.",
            show_default=False,
        ),
    ] = None,
    history: Annotated[
        Literal["gold", "own"], typer.Option(help="What later turns read as earlier answers: references, or its own.")
    ] = "gold",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every reply here; the same command goes on from it.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what failed in --out.")] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="First check the references, no context, and asking twice.")
    ] = False,
    memory: Memory = "80%",
    kv: KV = "plain",
    dtype: Dtype = "auto",
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Run tasks and report mean scores with their intervals, by depth and by turn.

    `eval list` shows the tasks. With --out, a run that was interrupted goes on where it was.
    """
    from elbowroom.commands.evaluate_report import print_run, run_to_json
    from elbowroom.commands.evaluate_run import EvalOptions, measure
    from elbowroom.commands.terminal import print_json
    from elbowroom.evals.run_plan import RunPlan, parse_tasks

    plan = RunPlan(
        tasks=parse_tasks(tasks),
        context_tokens=length,
        num_queries=num_queries,
        num_facts=keys,
        hops=hops,
        seed=seed,
        mode=mode,
        history=history,
    )
    options = EvalOptions(model, memory, kv, dtype, progress, out, controls, retry_errors)
    measured = measure(plan, options)
    if json:
        print_json(run_to_json(plan, measured))
    else:
        print_run(plan, measured)


@app.command("retrieval")
def retrieval(
    model: Model = None,
    length: Length = 1024,
    keys: Annotated[int, typer.Option(metavar="K", min=1, help="Facts in each context; every one is asked.")] = 8,
    num_queries: Queries = 400,
    seed: Seed = 0,
    memory: Memory = "80%",
    kv: KV = "plain",
    dtype: Dtype = "auto",
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Hide facts in source text, ask for each of them, and report the share of exact answers.

    A context is read once; every question is asked in its own fork of it, greedily. This is `eval run --tasks
    retrieval` with another report.
    """
    from elbowroom.commands.evaluate_report import print_retrieval, retrieval_to_json
    from elbowroom.commands.evaluate_run import EvalOptions, measure
    from elbowroom.commands.terminal import print_json
    from elbowroom.evals.run_plan import RunPlan

    plan = RunPlan(tasks=("retrieval",), context_tokens=length, num_queries=num_queries, num_facts=keys, seed=seed)
    measured = measure(plan, EvalOptions(model, memory, kv, dtype, progress))
    if json:
        print_json(retrieval_to_json(plan, measured))
    else:
        print_retrieval(plan, measured)
