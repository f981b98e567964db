"""``elbowroom bench``: measure, against a rival where there is one, and say which claims hold."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elbowroom.commands.options import Json
from elbowroom.errors import ElbowroomError, RequestError

if TYPE_CHECKING:
    from elbowroom.bench.base import BenchResult


_OF_SERVE = (
    *("--trace", "--policy", "--order", "--preemption", "--swap", "--simulate"),
    *("--memory", "--ttft", "--gap", "--max-tokens", "--requests", "--rate", "--report"),
)


def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks; none means all.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the names and stop.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small versions, whose claims prove nothing.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the loads.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write NAME_DATE.json here; it must exist.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="serve: trace to replay; without it a small load is made.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="serve: admission policy; repeat it to compare.")
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="serve: who is served first; repeat it to compare.")
    ] = None,
    preemption: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="serve: recompute, swap or auto; repeat it to compare."),
    ] = None,
    swap: Annotated[
        Path | None, typer.Option(metavar="DIR", help="serve: where sequences are saved; it must exist.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="serve: price steps instead of computing them.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="serve: of the KV cache; by default 0.7 of the trace's mean live KV."),
    ] = None,
    ttft: Annotated[float, typer.Option(metavar="S", help="serve: target of the first token, in seconds.")] = 10.0,
    gap: Annotated[float, typer.Option(metavar="S", help="serve: target of the largest gap, in seconds.")] = 1.5,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="serve: limit that clients send; 4,096, or 400 without a trace."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="serve: the first N requests of the trace.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="serve: requests a second; by default those of the trace.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="serve: write an HTML page with pictures.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure, and say which claims hold.

    With --json, exactly one object {name, machine, rows, claims} is printed for each benchmark, one a line. A part that
    fails leaves its claims without values; the others are measured, and the exit code is 1.
    """
    from elbowroom.commands.terminal import print_json

    if output is not None and not output.is_dir():
        raise RequestError(f"--output {output} is no directory", "make it first")
    from elbowroom.bench import BENCHES, BenchOptions, LoadOptions

    if list_only:
        typer.echo("\n".join(BENCHES.names()))
        return
    chosen = names or list(BENCHES.names())
    load = LoadOptions(
        trace=trace,
        policies=tuple(policy or LoadOptions().policies),
        orders=tuple(order or LoadOptions().orders),
        preemptions=tuple(preemption or LoadOptions().preemptions),
        swap=swap,
        simulate=simulate,
        memory=memory,
        ttft_s=ttft,
        gap_s=gap,
        max_tokens=max_tokens,
        num_requests=requests,
        rate=rate,
        report=report,
    )
    if load != LoadOptions() and chosen != ["serve"]:
        raise RequestError(f"{', '.join(_OF_SERVE)} are for serve", "write: elbowroom bench serve ...")
    load.check()
    try:
        runs = {name: BENCHES.get(name) for name in chosen}
    except ImportError as missing:
        raise RequestError(f"a benchmark needs the package {missing.name}", "`make bench` installs it") from missing
    failures: list[str] = []
    for name, run in runs.items():
        sys.stderr.write(f"{name} ...\n")
        result = run(BenchOptions(quick=quick, seed=seed, load=load))
        failures += [f"{name}: {failure}" for failure in result.failures]
        if output is not None:
            _write(result, output)
        if json:
            print_json(result.to_json())
        else:
            _print(result)
    if failures:
        raise ElbowroomError(f"could not be measured: {'; '.join(failures)}", "the reasons of their claims say why")


def _write(result: BenchResult, directory: Path) -> None:
    import json

    date = datetime.now(UTC).date().isoformat()
    path = directory / f"{result.name}_{date}.json"
    path.write_text(json.dumps({"date": date} | result.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _print(result: BenchResult) -> None:
    typer.echo(result.name)
    for row in result.rows:
        typer.echo("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    for claim in result.claims:
        verdict = "holds" if claim.holds else "FAILS"
        typer.echo(f"  {verdict}  {claim.id} {_short(claim.value)} {claim.op} {claim.target:g} {claim.unit}")
        if claim.reason:
            typer.echo(f"         {claim.reason}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
