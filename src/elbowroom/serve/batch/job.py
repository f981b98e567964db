"""run_batch: answers a file of requests, in the OpenAI batch format, inside a memory budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elbowroom import __version__
from elbowroom.engine.admission import ADMISSIONS
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.build import build_engine
from elbowroom.engine.engine import Engine
from elbowroom.engine.offline.costs import measure_costs
from elbowroom.engine.offline.forecast import Forecast, forecast
from elbowroom.engine.offline.plan import Order
from elbowroom.engine.offline.prompts import PromptSpool
from elbowroom.engine.offline.sequences import offline_sequences
from elbowroom.engine.resident import Progress, model_fingerprint
from elbowroom.engine.scheduler import Scheduler
from elbowroom.engine.scheduling import Scheduling
from elbowroom.engine.types import SchedulerStats
from elbowroom.errors import RequestError
from elbowroom.memory.meter import available_bytes
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config
from elbowroom.serve.batch.journal import Journal, job_of
from elbowroom.serve.batch.runner import NUM_WAITING, Runner
from elbowroom.serve.batch.scan import Scan, scan
from elbowroom.serve.batch.source import BatchInput
from elbowroom.serve.context import ServerContext
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.metrics import ServerMetrics
from elbowroom.serve.open_requests import OpenRequests
from elbowroom.serve.served import ServedModels
from elbowroom.units import parse_bytes

_SMALL_PLAN_BYTES = 2 * 2**20
"""So much of a plan the engine's reserve bears; a larger one is taken from the KV cache."""


def _no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How a batch is run; see ``elbowroom batch --help``."""

    model: str | None = None
    """A Hugging Face model directory; None: the built-in model."""
    name: str | None = None
    """What lines may write into ``model``; by default that of the directory."""
    memory: str | int = "80%"
    kv: str | None = None
    kv_choices: tuple[str, ...] = ()
    kv_relief: str | None = None
    dtype: str = "auto"
    max_sequences: int | None = None
    """Most sequences that run at once; None: as many as keep their logits small beside the budget."""
    kv_bytes: int | None = None
    """Most bytes of the KV cache; None: what the budget leaves."""
    admission: str = "past_future"
    """Who may begin: an admission policy by name."""
    seed: int = 0
    """Of requests that bring none."""
    order: Order = "planned"
    restart: bool = False
    """Forget what an earlier run wrote."""
    sort: bool = False
    """Put the answers into the order of the input at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What a batch came to."""

    num_lines: int
    num_answered: int
    """With what earlier runs answered."""
    num_failed: int
    """Lines whose answer is an error, those of earlier runs included."""
    num_before: int
    """Lines that earlier runs had written."""
    seconds: float
    """From the first request to the last answer."""
    prompt_tokens: int
    """Of this run, for each sample, as the following."""
    computed_tokens: int
    """Prompt tokens that no shared prefix spared."""
    generated_tokens: int
    preemptions: int
    forecast: Forecast | None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers."""
        return asdict(self) | {"forecast": None if self.forecast is None else self.forecast.to_json()}


@dataclass(slots=True, kw_only=True)
class BatchViewer:
    """Who is shown what happens; by default nobody."""

    loading: Progress = _no_progress
    """Bytes loaded, and in all."""
    answering: Callable[[int, int], None] = _no_progress
    """Lines done, and in all."""
    forecast: Callable[[Forecast], None] = field(default=lambda _forecast: None)
    """Called before the first request runs."""
    engine: Callable[[Engine], None] = field(default=lambda _engine: None)
    """Called when the model is loaded."""


def run_batch(
    source: str | Path,
    target: str | Path,
    options: BatchOptions | None = None,
    viewer: BatchViewer | None = None,
) -> BatchReport:
    """Answer each line of ``source`` with one of ``target``; lines that ``target`` has from a run before are skipped.

    Whatever ends a run, a kill included, the same call goes on from there.

    Args:
        source: JSONL, each line ``{"custom_id", "method", "url", "body"}``; it is read more than once.
        target: JSONL, each line ``{"id", "custom_id", "response", "error"}``, in the order of completion.
        options: model, memory and order.
        viewer: is shown forecast and progress.

    Raises:
        RequestError: a file cannot be used, or ``target`` is of another batch.
        OutputFailed: an answer could not be written; what was written is kept.
        BudgetTooSmall: the budget cannot hold the model and one short sequence.
        ModelError: the model cannot be used.
    """
    options, viewer = options or BatchOptions(), viewer or BatchViewer()
    limits = _limits()
    path = Path(target)
    lines = BatchInput(Path(source), limits.max_body_bytes)
    try:
        if path.exists() and path.samefile(source):
            raise RequestError(f"input and output are both {path}", "choose another output")
        with Journal(path, _job(lines, options), options.restart) as journal:
            engine = _engine(options, viewer)
            try:
                return _run(lines, journal, engine, options, viewer)
            finally:
                engine.close()
    finally:
        lines.close()


def forecast_batch(
    source: str | Path,
    options: BatchOptions | None = None,
    viewer: BatchViewer | None = None,
    spool: Path | None = None,
) -> tuple[Forecast, int]:
    """Return what answering all of ``source`` would take, and how many lines would get errors; nothing is written.

    ``spool`` is a directory with room for 4 bytes a prompt token; errors as in ``run_batch``.
    """
    options, viewer = options or BatchOptions(), viewer or BatchViewer()
    lines = BatchInput(Path(source), _limits().max_body_bytes)
    try:
        engine = _engine(options, viewer)
        try:
            with PromptSpool(spool or Path(source).resolve().parent) as prompts:
                found = scan(lines, _context(engine, options), engine, prompts, ())
                return _forecast(found, engine, options), len(found.refused) + len(found.duplicates)
        finally:
            engine.close()
    finally:
        lines.close()


def _run(
    lines: BatchInput, journal: Journal, engine: Engine, options: BatchOptions, viewer: BatchViewer
) -> BatchReport:
    num_before, begin, foreseen = len(journal.offsets), time.perf_counter(), None
    context, before = _context(engine, options), SchedulerStats()
    with PromptSpool(journal.path.resolve().parent) as spool:
        found = scan(lines, context, engine, spool, journal.offsets)
        if len(spool):
            if found.held_bytes > _SMALL_PLAN_BYTES:
                engine.set_budget(engine.parts.memory.budget_bytes - found.held_bytes)
            foreseen = _forecast(found, engine, options)
            viewer.forecast(foreseen)
        begin, before = time.perf_counter(), _copy(engine.stats())
        runner = Runner(lines, found, context, engine, journal, options.seed)
        runner.run(found.plan(options.order), viewer.answering)
    seconds, stats = time.perf_counter() - begin, engine.stats()
    if options.sort:
        journal.sort()
    prompt_tokens = stats.prompt_tokens - before.prompt_tokens
    return BatchReport(
        num_lines=found.num_lines,
        num_answered=len(journal.offsets) - journal.num_failed,
        num_failed=journal.num_failed,
        num_before=num_before,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        computed_tokens=prompt_tokens - (stats.cached_prompt_tokens - before.cached_prompt_tokens),
        generated_tokens=stats.generated_tokens - before.generated_tokens,
        preemptions=stats.preemptions - before.preemptions,
        forecast=foreseen,
    )


def _forecast(found: Scan, engine: Engine, options: BatchOptions) -> Forecast:
    costs = measure_costs(engine, found.longest, options.seed)
    real = engine.parts.core.scheduler
    admission = ADMISSIONS.get(options.admission)()
    twin = Scheduler(real.config, real.account.pricings, real.account.capacity_bytes, admission)
    return forecast(found.plan(options.order), found.new_tokens, twin, costs, NUM_WAITING, found.kv_plans)


def _engine(options: BatchOptions, viewer: BatchViewer) -> Engine:
    vocab_size = read_config(find_model(options.model)).vocab_size
    most = options.max_sequences or offline_sequences(vocab_size, parse_bytes(options.memory, available_bytes()))
    engine = build_engine(
        options.model,
        options.memory,
        options.kv,
        options.dtype,
        kv_choices=options.kv_choices,
        kv_relief=options.kv_relief,
        max_sequences=most,
        scheduling=Scheduling(admission=options.admission),
        seed=options.seed,
        progress=viewer.loading,
    )
    try:
        if options.kv_bytes is not None:
            held = engine.parts.core.scheduler.account.capacity_bytes
            engine.set_budget(engine.parts.memory.budget_bytes - max(held - options.kv_bytes, 0))
        viewer.engine(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def _limits() -> ServerLimits:
    return ServerLimits(
        max_open_requests=2**31, max_queue=2**31
    )  # whether a line may run is not a question of how many do


def _context(engine: Engine, options: BatchOptions) -> ServerContext:
    limits = _limits()
    models = ServedModels({_name(options): AsyncLLM(engine)}, limits)
    return ServerContext(models, limits, ServerMetrics(), OpenRequests(limits.max_open_requests))


def _name(options: BatchOptions) -> str:
    if options.name:
        return options.name
    return Path(options.model).resolve().name if options.model else "builtin"


def _job(lines: BatchInput, options: BatchOptions) -> dict[str, Any]:
    """Return what the answers depend on, of which an output may hold those of one batch only."""
    return job_of(
        {
            "elbowroom": __version__,
            "input": lines.digest(),
            "model": model_fingerprint(find_model(options.model)).hex(),
            "name": _name(options),
            "kv": options.kv,
            "kv_choices": list(options.kv_choices),
            "kv_relief": options.kv_relief,
            "dtype": options.dtype,
            "seed": options.seed,
        }
    )


def _copy(stats: SchedulerStats) -> SchedulerStats:
    return SchedulerStats(
        prompt_tokens=stats.prompt_tokens,
        cached_prompt_tokens=stats.cached_prompt_tokens,
        generated_tokens=stats.generated_tokens,
        preemptions=stats.preemptions,
    )
