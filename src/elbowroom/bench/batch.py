"""batch: what the plan of an offline job is worth against arrival order with an LRU prefix cache of the same size.

The built-in model on this CPU, in this process: 40 documents with 25 questions each, shuffled; the KV cache holds three
documents. ``planned`` is what ``elbowroom batch`` does; ``sorted`` walks the same tree and leaves it to the LRU cache
what stays; ``arrival`` takes the lines as they come. Seconds run from the loaded engine to the last answer, with
reading, planning and the forecast. Few-shot tasks and turns of conversations in the same cache, too. Then a small batch
is killed (SIGKILL) again and again, while it starts and while it answers.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.batch_kills import KillResult, kill_again_and_again
from elbowroom.bench.batch_loads import LONGEST_DOCUMENT, NEW_TOKENS, prompts, read_answers, write_lines
from elbowroom.bench.machine import machine_info
from elbowroom.engine.accounting import num_blocks
from elbowroom.engine.engine import Engine
from elbowroom.engine.offline.plan import Order
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config
from elbowroom.serve.batch import BatchOptions, BatchReport, BatchViewer, run_batch

MEMORY = "256MiB"
DOCUMENTS_HELD = 3
RUNS: dict[str, tuple[Order, ...]] = {
    "documents": ("arrival", "sorted", "planned"),
    "few-shot": ("arrival", "planned"),
    "turns": ("arrival", "planned"),
}
NUM_KILLS = 20
RIVAL_S = 900.0
"""After which the rival is given up."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run."""

    seconds: float
    report: BatchReport
    answers: dict[str, str]
    peak_kv_bytes: int
    kv_bytes: int


def run(options: BenchOptions) -> BenchResult:
    """Measure (quick: a tenth of the documents, three kills)."""
    machine, shrink = machine_info(), 10 if options.quick else 1
    vocab_size = read_config(find_model(None)).vocab_size
    rows: list[Row] = []
    runs: dict[tuple[str, str], Measured] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for load, orders in RUNS.items():
            source = directory / f"{load}.jsonl"
            write_lines(source, prompts(load, vocab_size, options.seed, shrink))
            for order in orders:
                runs[load, order] = _measure(source, directory / f"{load}-{order}.jsonl", order)
                rows.append(_row(load, order, runs[load, order], runs[load, orders[0]]))
        rows.append(_rival_row(vocab_size, options, shrink))
        kills = kill_again_and_again(
            directory, vocab_size, 3 if options.quick else NUM_KILLS, options.seed, 5 if not options.quick else 20
        )
    rows.append(
        {
            "kills": kills.num_kills,
            "while_answering": kills.num_while_answering,
            "requests": kills.num_requests,
            "not_answered_once": kills.num_wrong,
            "answers_differing": kills.num_differing,
        }
    )
    return BenchResult(name="batch", machine=machine, rows=rows, claims=_claims(runs, kills))


def _measure(source: Path, target: Path, order: Order) -> Measured:
    sys.stderr.write(f"  {source.stem}, {order}\n")
    loaded: list[tuple[Engine, float]] = []
    viewer = BatchViewer(engine=lambda engine: loaded.append((engine, time.perf_counter())))
    settings = BatchOptions(memory=MEMORY, order=order, kv_bytes=_kv_bytes())
    report = run_batch(source, target, settings, viewer)
    [(engine, begin)] = loaded
    seconds = time.perf_counter() - begin
    peak = engine.ledger()["kv"]["host"]["peak_bytes"]
    assert report.forecast is not None
    return Measured(seconds, report, dict(read_answers(target)), peak, report.forecast.kv_bytes)


def _kv_bytes() -> int:
    """Return what three of the longest documents take in the KV cache."""
    from elbowroom.engine.llm import LLM

    with LLM(memory=MEMORY) as llm:
        [pricing] = llm.engine.parts.core.scheduler.account.pricings
    return pricing.transient_bytes + DOCUMENTS_HELD * pricing.price(num_blocks(LONGEST_DOCUMENT))


def _row(load: str, order: str, run: Measured, first: Measured) -> Row:
    report = run.report
    assert report.forecast is not None
    differing = sum(first.answers[name] != text for name, text in run.answers.items())
    return {
        "load": load,
        "order": order,
        "requests": report.num_answered,
        "seconds": run.seconds,
        "speedup": first.seconds / run.seconds,
        "prompt_tokens": report.prompt_tokens,
        "computed_tokens": report.computed_tokens,
        "saved_share": _saved(report),
        "best_share": report.forecast.best_share,
        "generated_tokens": report.generated_tokens,
        "preemptions": report.preemptions,
        "answering_s": report.seconds,
        "forecast_s": report.forecast.seconds,
        "forecast_computed_tokens": report.forecast.computed_tokens,
        "kv_bytes": run.kv_bytes,
        "peak_kv_bytes": run.peak_kv_bytes,
        "answers_unlike_arrival": differing,
    }


def _saved(report: BatchReport) -> float:
    return 1.0 - report.computed_tokens / report.prompt_tokens


def _rival_row(vocab_size: int, options: BenchOptions, shrink: int) -> Row:
    """Return the requests a second of transformers' continuous batching on the same requests (quick: on six)."""
    asked = prompts("documents", vocab_size, options.seed, shrink)[: 6 if options.quick else None]
    row = {"load": "documents", "order": "transformers generate_batch, arrival", "requests": len(asked)}
    if importlib.util.find_spec("transformers") is None:
        return row | {"seconds": None, "reason": "transformers is not installed: `make bench` installs it"}
    blocks = DOCUMENTS_HELD * num_blocks(LONGEST_DOCUMENT)
    spec = json.dumps({"prompts": asked, "num_blocks": blocks, "new_tokens": NEW_TOKENS})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "elbowroom.bench.batch_rival"],
            input=spec,
            capture_output=True,
            text=True,
            timeout=RIVAL_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return row | {"seconds": None, "reason": f"no end of {len(asked)} requests within {RIVAL_S:.0f} s"}
    except subprocess.CalledProcessError as error:
        return row | {"seconds": None, "reason": error.stderr.strip().splitlines()[-1][:200]}
    result = json.loads(done.stdout.splitlines()[-1])
    if result["errors"] or result["num_answers"] != len(asked):
        return row | {"seconds": None, "reason": f"answered {result['num_answers']}; {result['errors']}"}
    return row | {"seconds": result["seconds"], "requests_per_s": len(asked) / result["seconds"]}


def _claims(runs: dict[tuple[str, str], Measured], kills: KillResult) -> list[Claim]:
    planned, arrival = runs["documents", "planned"], runs["documents", "arrival"]
    assert planned.report.forecast is not None
    missed = 100 * (planned.report.forecast.best_share - _saved(planned.report))
    return [
        Claim(
            id="batch.speedup",
            value=arrival.seconds / planned.seconds,
            op=">=",
            target=1.3,
            unit="x of arrival order with an LRU cache of the same size",
            reason="one run each, from the loaded engine to the last answer",
        ),
        Claim(
            id="batch.saving",
            value=missed,
            op="<=",
            target=2.0,
            unit="points of prompt tokens below the multi-level optimum",
        ),
        Claim(
            id="batch.once",
            value=float(kills.num_wrong),
            op="<=",
            target=0,
            unit="requests not answered exactly once",
            num_runs=kills.num_kills,
            reason=f"{kills.num_while_answering} of {kills.num_kills} kills came while answers were being written",
        ),
    ]
