"""``elbowroom eval``: how well a model uses its context inside a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from elbowroom.commands.options import KV, Dtype, Json, Memory, Model, Progress
from elbowroom.errors import RequestError

if TYPE_CHECKING:
    from elbowroom.evals.retrieval import RetrievalResult
    from elbowroom.evals.samples import TaskSpec

app = typer.Typer(help="Measure how well a model uses its context inside a memory budget.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure how well a model uses its context inside a memory budget."""


@app.command("retrieval")
def retrieval(
    model: Model = None,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each context.")] = 1024,
    keys: Annotated[int, typer.Option(metavar="K", min=1, help="Facts in each context; every one is asked.")] = 8,
    num_queries: Annotated[int, typer.Option(metavar="N", min=1, help="Questions in all, at least.")] = 400,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the contexts.")] = 0,
    memory: Memory = "80%",
    kv: KV = "plain",
    dtype: Dtype = "auto",
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Hide facts in source text, ask for each of them, and report the share of exact answers.

    A context is read once; every question is asked in its own fork of it, greedily.
    """
    from elbowroom.commands.report import RunReport
    from elbowroom.commands.terminal import print_json, progress_bar, wants_progress
    from elbowroom.models.directory import find_model, read_ahead

    read_ahead(find_model(model))
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer, run_parallel
    from elbowroom.evals.samples import TaskSpec
    from elbowroom.evals.samples import retrieval as make_samples

    shown = wants_progress(progress)
    spec = TaskSpec(context_tokens=length, num_queries=num_queries, num_facts=keys, seed=seed)
    with progress_bar("loading", shown, in_bytes=True) as bar:
        llm = LLM(model, memory, kv, dtype, progress=bar)
    with llm, progress_bar("asking", shown) as bar:
        _check_length(length, llm.engine.parts.config.max_positions)
        target = EngineTarget(llm)
        total = -(-num_queries // keys) * keys
        with _task_errors():
            samples = make_samples(PlainTokenizer(llm.tokenizer), spec)
            result = run_parallel(target, samples, target.num_parallel(length), lambda done: bar(done, total))
        report = RunReport.of(llm.engine)
    if json:
        print_json(_to_json(spec, result) | report.to_json())
    else:
        _print_text(spec, result)
        report.print()


def _check_length(length: int, max_positions: int) -> None:
    if length > max_positions:
        raise RequestError(
            f"--length {length} exceeds the model's context of {max_positions} tokens", f"use --length {max_positions}"
        )


@contextmanager
def _task_errors() -> Iterator[None]:
    """Turn what the generators say about impossible sizes into an error of the request."""
    try:
        yield
    except ValueError as reason:
        raise RequestError(str(reason), "change --length or --keys") from reason


def _to_json(spec: TaskSpec, result: RetrievalResult) -> dict[str, object]:
    head = {"task": "retrieval", "length": spec.context_tokens, "keys": spec.num_facts, "seed": spec.seed}
    return head | result.to_json() | {"lowest_decile": result.lowest_decile()}


def _print_text(spec: TaskSpec, result: RetrievalResult) -> None:
    low, high = result.interval
    typer.echo(
        f"retrieval, {spec.context_tokens} tokens, {spec.num_facts} facts each: "
        f"{result.num_correct} of {result.num_queries} exact ({result.accuracy:.1%}; "
        f"95% interval {low:.1%} to {high:.1%})"
    )
    for index, part in enumerate(result.by_depth):
        share = "no questions" if part.accuracy is None else f"{part.accuracy:.1%} of {part.num_queries}"
        typer.echo(f"  depth {index * 10:3d}-{index * 10 + 10}%  {share}")
