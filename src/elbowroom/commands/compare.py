"""``elbowroom compare``: KV plans side by side, in bytes, speed and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from elbowroom.commands.options import Dtype, Json, Memory, Model, Progress

DEFAULT_TASKS = "retrieval,chains,many_shot,follow_ups,perplexity"


def compare(
    methods: Annotated[list[str], typer.Argument(metavar="PLAN...", help='KV plans, e.g. int8 "kivi(2,2,64)".')],
    model: Model = None,
    length: Annotated[
        int, typer.Option(metavar="N", min=128, help="Tokens of each context, with its questions and answers.")
    ] = 1024,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks of `eval list`, and perplexity.")] = DEFAULT_TASKS,
    keys: Annotated[int, typer.Option(metavar="K", min=1, help="Questions about each context.")] = 4,
    hops: Annotated[int, typer.Option(metavar="N", min=1, help="Links of a chain in the task chains.")] = 1,
    num_queries: Annotated[int, typer.Option(metavar="N", min=1, help="Questions of each task, at least.")] = 200,
    num_windows: Annotated[
        int, typer.Option("--windows", metavar="N", min=2, help="Windows of held-out text in perplexity.")
    ] = 16,
    num_contexts: Annotated[
        int, typer.Option("--contexts", metavar="N", min=1, help="Contexts held at once while bytes are measured.")
    ] = 5,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the contexts.")] = 0,
    equal: Annotated[
        Literal["bytes", "quality"] | None,
        typer.Option(
            help="bytes: rank by quality those within 5 % of the same bytes; quality: rank by bytes those that are "
            "not worse than dense.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep results and picture here; the same command goes on.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what failed in --out.")] = False,
    memory: Memory = "80%",
    dtype: Dtype = "auto",
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Compare ways to keep keys and values: resident bytes, process peak, speed, and quality against dense.

    Each plan runs in a process of its own on the same questions; plain is always measured, first. A task on which
    plain scores below 0.95 is not compared. With --out, what was interrupted goes on where it was.
    """
    from elbowroom.commands.compare_chart import draw
    from elbowroom.commands.compare_report import comparison_to_json, print_comparison
    from elbowroom.commands.compare_run import CompareOptions, open_comparison
    from elbowroom.commands.compare_run import compare as measure
    from elbowroom.commands.terminal import print_json
    from elbowroom.evals.comparison.plan import ComparePlan, parse_compared_tasks, parse_methods
    from elbowroom.evals.run_plan import RunPlan

    with_questions, with_perplexity = parse_compared_tasks(tasks)
    questions = RunPlan(
        tasks=with_questions,
        context_tokens=length,
        num_queries=num_queries,
        num_facts=keys,
        hops=hops,
        seed=seed,
    )
    plan = ComparePlan(
        methods=parse_methods(methods),
        questions=questions,
        num_windows=num_windows if with_perplexity else 0,
        num_contexts=num_contexts,
    )
    options = CompareOptions(model, memory, dtype, progress, out, retry_errors)
    with open_comparison(plan, options) as root:
        comparison = measure(plan, options, root.path)
        result = comparison_to_json(plan, comparison, equal) | {"env": root.read("env")}
        root.write("compare", result)
        pictures, missing = draw(comparison, root.path) if out is not None else ([], None)
    if json:
        print_json(result)
    else:
        print_comparison(plan, comparison, equal)
        for path in pictures:
            typer.echo(f"picture: {path}")
    if missing is not None:
        typer.echo(missing, err=True)
