"""``elbowroom calibrate``: measure once of a model what some KV plans need to know of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elbowroom.commands.options import Dtype, Json, Memory, Progress
from elbowroom.errors import RequestError
from elbowroom.units import format_bytes

if TYPE_CHECKING:
    from elbowroom.kv.calibration import Calibration

_SHOWN_HEADS = 3


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]", help="Hugging Face model directory; without it, the built-in model.", show_default=False
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Contexts with four facts each, all of which are asked.")
    ] = 16,
    length: Annotated[int, typer.Option(metavar="N", min=256, help="Tokens of the longest context, at most.")] = 4096,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text around the facts, of which the first MiB is used; by default Python's standard library.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write; by default beside the model, where it is looked for.",
            show_default=False,
        ),
    ] = None,
    memory: Memory = "80%",
    dtype: Dtype = "auto",
    json: Json = False,
    progress: Progress = None,
) -> None:
    """Measure retrieval heads, errors of layers and key magnitudes, and write them beside the model.

    KV plans such as "compresskv(256)" need kv_calibration.json. The model is asked for facts hidden in text; what its
    heads look at while it answers is counted where the answer is right. A model that finds no fact is refused.
    """
    from elbowroom.commands.terminal import print_json, progress_bar, wants_progress
    from elbowroom.models.directory import find_model, read_ahead

    directory = find_model(model)
    target = out or directory
    with _file_errors(target):
        _check_writable(target)
    read_ahead(directory)
    from elbowroom.engine.resident import load_resident
    from elbowroom.evals.calibration.measure import Effort, tasks_bytes
    from elbowroom.evals.calibration.measure import calibrate as measure
    from elbowroom.evals.calibration.text import calibration_text
    from elbowroom.models.hf_config import read_config
    from elbowroom.models.path import ComputePath

    effort, words, shown = Effort(contexts, length), calibration_text(text), wants_progress(progress)
    reserved, started = tasks_bytes(read_config(directory), length), time.perf_counter()
    with progress_bar("loading", shown, in_bytes=True) as bar:
        loaded = load_resident(
            model, memory, "plain", dtype, path=ComputePath(0), max_sequences=1, tasks_bytes=reserved, progress=bar
        )
    try:
        with progress_bar("calibrating", shown) as bar:
            calibration = measure(loaded, words, effort, bar)
        cost = {
            "budget_bytes": loaded.memory.budget_bytes,
            "peak_over_baseline_bytes": loaded.meter.peak_over_baseline_bytes,
            "wall_s": round(time.perf_counter() - started, 3),
        }
    finally:
        loaded.close()
    with _file_errors(target):
        path = calibration.save(target)
    if json:
        print_json({"file": str(path), **asdict(calibration), **cost})
    else:
        _print(calibration, path, cost)


def _check_writable(directory: Path) -> None:
    """Find out before the work whether its result can be kept."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextmanager
def _file_errors(directory: Path) -> Iterator[None]:
    """Turn what the file system says into an error that names the option."""
    try:
        yield
    except OSError as reason:
        message = f"{directory} cannot be written to: {os.strerror(reason.errno or 0)}"
        raise RequestError(message, "give another directory with --out, and copy the file beside the model") from reason


def _print(calibration: Calibration, path: Path, cost: dict[str, int | float]) -> None:
    measured = calibration.measured
    typer.echo(
        f"{measured.successes} of {measured.runs} facts found in {measured.contexts} contexts of up to "
        f"{measured.longest_tokens:,} tokens; keys of {measured.key_tokens:,} tokens"
    )
    typer.echo("layer  error  best semantic heads        best copying heads")
    rows = zip(calibration.layer_errors, calibration.head_scores, calibration.copy_scores, strict=True)
    for layer, (error, semantic, copying) in enumerate(rows):
        typer.echo(f"{layer:5}  {error:5.3f}  {_best(semantic):25}  {_best(copying)}")
    peak, budget = (format_bytes(int(cost[name])) for name in ("peak_over_baseline_bytes", "budget_bytes"))
    typer.echo(f"{cost['wall_s']:.0f} s, peak {peak} of {budget}; written: {path}")


def _best(scores: tuple[float, ...]) -> str:
    order = sorted(range(len(scores)), key=lambda head: -scores[head])
    return "  ".join(f"{head} ({scores[head]:.2f})" for head in order[:_SHOWN_HEADS])
