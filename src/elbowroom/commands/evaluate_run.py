"""What ``eval run`` and ``eval retrieval`` do: load a model, check it, ask it, keep the outcomes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elbowroom.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from elbowroom.commands.report import RunReport
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.controls import ControlResult
    from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer
    from elbowroom.evals.retrieval import RetrievalResult
    from elbowroom.evals.run_directory import RunDirectory
    from elbowroom.evals.run_plan import RunPlan


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options of the command line beside the plan."""

    model: str | None
    memory: str
    kv: str
    dtype: str
    progress: bool | None
    out: Path | None = None
    controls: bool = False
    retry_errors: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run found."""

    results: dict[str, RetrievalResult]
    controls: dict[str, ControlResult]
    """Empty when they were not asked for."""
    report: RunReport

    def summary(self) -> dict[str, object]:
        """Return what summary.json holds: the same however often the run was interrupted."""
        return {"tasks": {name: result.to_json() for name, result in self.results.items()}}


def measure(plan: RunPlan, options: EvalOptions) -> Measured:
    """Run ``plan`` as the options say and write the summary.

    Raises:
        RequestError: the plan does not fit the model, or ``--out`` another run.
        BudgetError: the model does not fit the memory.
        IntegrityError: a control failed.
    """
    from elbowroom.commands.report import RunReport
    from elbowroom.commands.terminal import progress_bar, wants_progress
    from elbowroom.models.directory import find_model, read_ahead

    if options.retry_errors and options.out is None:
        raise RequestError("--retry-errors needs a run that was kept", "give --out as well")
    read_ahead(find_model(options.model))
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer
    from elbowroom.evals.runner import run_plan

    shown = wants_progress(options.progress)
    with progress_bar("loading", shown, in_bytes=True) as bar:
        llm = LLM(options.model, options.memory, options.kv, options.dtype, progress=bar)
    with llm:
        check_length(plan.context_tokens, llm)
        target, tokenizer = EngineTarget(llm), PlainTokenizer(llm.tokenizer)
        num_parallel = target.num_parallel(plan.context_tokens)
        with open_directory(plan, llm, options) as directory:
            controls = _controls(plan, target, tokenizer, shown) if options.controls else {}
            with progress_bar("asking", shown) as bar:
                results = run_plan(plan, target, tokenizer, num_parallel=num_parallel, directory=directory, advance=bar)
            _check_answered(results)
            measured = Measured(results, controls, RunReport.of(llm.engine))
            if directory is not None:
                _write(directory, measured)
    return measured


@contextmanager
def open_directory(plan: RunPlan, llm: LLM, options: EvalOptions) -> Iterator[RunDirectory | None]:
    """Yield the directory that the options name, if they do; closed at the end of the block."""
    if options.out is None:
        yield None
        return
    from elbowroom.bench.machine import machine_info
    from elbowroom.evals.run_directory import RunDirectory

    target = describe_model(options.model, options.dtype) | {"kv": options.kv}
    env = machine_info(probe=False) | {"budget_bytes": llm.engine.parts.memory.budget_bytes}
    directory = RunDirectory(options.out, plan.to_json() | target, env, options.retry_errors)
    try:
        yield directory
    finally:
        directory.close()


def describe_model(model: str | None, dtype: str) -> dict[str, object]:
    """Return what tells one model under evaluation from another, with the version that runs it.

    Raises:
        TokenizerError: the directory has no tokenizer, so that no task can be written.
    """
    from elbowroom import __version__
    from elbowroom.engine.resident import model_fingerprint
    from elbowroom.models.directory import find_model

    directory = find_model(model)
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise TokenizerError(f"{directory} has no tokenizer.json", "evaluation needs one: give another --model")
    return {
        "elbowroom": __version__,
        "model": model_fingerprint(directory).hex(),
        "tokenizer": hashlib.blake2b(tokenizer.read_bytes(), digest_size=8).hexdigest(),
        "dtype": dtype,
    }


def _controls(plan: RunPlan, target: EngineTarget, tokenizer: PlainTokenizer, shown: bool) -> dict[str, ControlResult]:
    from elbowroom.commands.terminal import progress_bar
    from elbowroom.evals.controls import run_controls

    done: dict[str, ControlResult] = {}
    with progress_bar("controls", shown) as bar:
        for name, result in run_controls(plan, target, tokenizer):
            done[name] = result
            bar(len(done), len(plan.tasks))
    return done


def _write(directory: RunDirectory, measured: Measured) -> None:
    directory.write("summary", measured.summary())
    if measured.controls:
        directory.write("controls", {name: result.to_json() for name, result in measured.controls.items()})


def _check_answered(results: dict[str, RetrievalResult]) -> None:
    """Raise when not one question was answered: then there is nothing to report."""
    errors = [error for result in results.values() for error in result.errors]
    if errors and not any(result.num_queries for result in results.values()):
        raise RequestError(f"no question was answered: {errors[0]}", "change --length, --memory or --kv")


def check_length(length: int, llm: LLM) -> None:
    """Raise when contexts of ``length`` tokens, and what the tokenizer puts in front, exceed the model's context."""
    special = len(llm.tokenizer.encode(""))
    most = llm.engine.parts.config.max_positions - special
    if length > most:
        raise RequestError(f"--length {length} exceeds the model's context of {most} tokens", f"use --length {most}")
