"""``elbowroom batch``: answer a file of requests inside a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from elbowroom.commands.options import KV, Admission, Dtype, Json, Memory, Progress, Relief

if TYPE_CHECKING:
    from elbowroom.serve.batch import BatchOptions


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one JSON object a line.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Gets one line for each.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help='Model directory and the name that lines may write into "model"; without it, the built-in model.',
            show_default=False,
        ),
    ] = None,
    memory: Memory = "80%",
    kv: KV = "plain",
    kv_choice: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help='Plan that a line may ask for by "kv"; repeatable.', show_default=False),
    ] = None,
    kv_relief: Relief = None,
    dtype: Dtype = "auto",
    max_sequences: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most sequences that run at once; by default up to 512, fewer where their logits would be large.",
            show_default=False,
        ),
    ] = None,
    admission: Admission = "past_future",
    order: Annotated[
        str,
        typer.Option(
            metavar="ORDER",
            help="planned: prefixes are computed once and kept; sorted, arrival: left to a cache (to compare with).",
        ),
    ] = "planned",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of requests that bring none.")] = 0,
    sort: Annotated[bool, typer.Option("--sorted", help="Put answers into the order of IN at the end.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what OUT holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the forecast and stop; OUT is not touched.")
    ] = False,
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Answer a file of requests, each exactly once.

    Lines are those of the OpenAI batch format, for /v1/completions and /v1/chat/completions, and get the answers that
    they would get over HTTP. Prefixes that lines share are computed once. A forecast is printed before the first
    request runs. A line that cannot be answered gets an error; the run goes on. Whatever ends a run, Ctrl-C and kill -9
    included, the same command goes on from there; what OUT is of is kept in OUT.job.

    The exit code is 1 if a line has an error for an answer.
    """
    from elbowroom.errors import RequestError
    from elbowroom.serve.preload import preload

    if order not in ("planned", "sorted", "arrival"):
        raise RequestError(f"--order {order!r} is unknown", "use planned, sorted or arrival")
    preload()
    from elbowroom.commands.serve import read_models
    from elbowroom.serve.batch import BatchOptions

    [(name, directory)] = read_models([model] if model else []).items()
    chosen: Literal["planned", "sorted", "arrival"] = order  # type: ignore[assignment]
    options = BatchOptions(
        model=directory,
        name=name,
        memory=memory,
        kv=kv,
        kv_choices=tuple(kv_choice or ()),
        kv_relief=kv_relief,
        dtype=dtype,
        max_sequences=max_sequences,
        admission=admission,
        seed=seed,
        order=chosen,
        restart=restart,
        sort=sort,
    )
    failed = (
        _foresee(source, target, options, json, progress) if dry_run else _run(source, target, options, json, progress)
    )
    if failed:
        raise typer.Exit(1)


def _foresee(source: Path, target: Path, options: BatchOptions, json: bool, progress: bool | None) -> int:
    from elbowroom.commands.batch_report import print_forecast
    from elbowroom.commands.terminal import print_json, progress_bar, wants_progress
    from elbowroom.serve.batch import BatchViewer, forecast_batch

    with progress_bar("loading", wants_progress(progress), in_bytes=True) as bar:
        found, refused = forecast_batch(source, options, BatchViewer(loading=bar), target.resolve().parent)
    if json:
        print_json({"forecast": found.to_json(), "num_refused": refused})
    else:
        print_forecast(found)
        typer.echo(f"{refused} lines cannot be answered" if refused else "every line can be answered")
    return 0


def _run(source: Path, target: Path, options: BatchOptions, json: bool, progress: bool | None) -> int:
    """Run the batch and return the number of lines with errors."""
    from elbowroom.commands.batch_report import print_forecast, print_report, print_stop
    from elbowroom.commands.terminal import print_json, progress_bar, wants_progress
    from elbowroom.serve.batch import BatchViewer, run_batch

    shown = wants_progress(progress)
    with progress_bar("loading", shown, in_bytes=True) as loading, progress_bar("answering", shown) as answering:
        viewer = BatchViewer(loading=loading, answering=answering)
        if not json:
            viewer.forecast = print_forecast
        try:
            report = run_batch(source, target, options, viewer)
        except KeyboardInterrupt:
            print_stop(target)
            raise
    if json:
        print_json(report.to_json())
    else:
        print_report(report)
    return report.num_failed
