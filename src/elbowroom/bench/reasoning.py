"""reasoning: a model that thinks, under load: accuracy, service and what users wait for, always side by side.

The small model that comes with Elbowroom adds up to 26 digits and thinks four tokens for each, so lengths follow
difficulty. Questions arrive with Gamma distributed gaps at a share of what this machine can do. Rows of part
``matrix``: weights x KV codec x prefix cache x burstiness, a fraction of all combinations (after "Reasoning Language
Model Inference Serving Unveiled", arXiv 2510.18672); intervals are the lowest and highest of the runs, one a seed.
Further parts: ``budget`` (accuracy, memory and goodput against the thinking budget), ``reserve`` (who gets an answer
when ``max_tokens`` is short), ``prefix`` (what the prefix cache costs where nothing is shared) and ``counters`` (client
against server). Tokens are counted as tokens, never as chunks; goodput asks for a correct answer within the limits.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.machine import machine_info
from elbowroom.bench.reasoning_http import compare_counters
from elbowroom.bench.reasoning_load import (
    MOST_THINKING,
    Outcome,
    Question,
    Replay,
    Slo,
    arriving,
    over_runs,
    questions,
    summary,
)
from elbowroom.engine.build import build_engine
from elbowroom.engine.engine import Engine
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.evals.stats import wilson_interval

MODEL, MEMORY, MAX_TOKENS = "builtin-thinking", "64MiB", 128
KVS = ("plain", "int8", "kivi(4,4,32)", "kivi(2,2,32)")
CVS = (0.5, 1.0, 2.0, 4.0)
BUDGETS = (0, 8, 16, 32, 48, 64, 80, None)
SHORT_MAX_TOKENS, RESERVE = 48, 6
LOAD = 0.6
"""Share of the capacity, as measured at the start with all questions at once, at which they arrive."""
SLO_SLOWDOWN = 4.0
"""The limit of the first visible token: so many times what the hardest question takes alone."""
SLO_GAP_S = 0.25


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the matrix."""

    weights: str = "bfloat16"
    kv: str = "plain"
    prefix_cache: bool = True
    cv: float = 1.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    num_questions: int
    num_seeds: int
    budgets: tuple[int | None, ...]
    num_pairs: int
    kvs: tuple[str, ...] = KVS
    cvs: tuple[float, ...] = CVS


FULL = Scale(num_questions=32, num_seeds=3, budgets=BUDGETS, num_pairs=7)
QUICK = Scale(num_questions=6, num_seeds=1, budgets=(0, 16), num_pairs=1, kvs=("plain", "kivi(2,2,32)"), cvs=(1.0,))


@dataclass(frozen=True, slots=True)
class Pace:
    """What this machine can do: questions a second, and the limits derived from it."""

    rate: float
    slo: Slo


def run(options: BenchOptions) -> BenchResult:
    """Measure all parts."""
    scale = QUICK if options.quick else FULL
    machine, seeds = machine_info(probe=False), range(options.seed, options.seed + scale.num_seeds)
    pace = measure_pace(scale, options.seed)
    rows: list[Row] = [
        {"part": "pace", "rate": pace.rate, "slo_ttfvt_s": pace.slo.ttfvt_s, "slo_gap_s": pace.slo.gap_s}
    ]
    matrix = list(matrix_rows(scale, pace, seeds))
    rows += matrix
    budgets, most_over = budget_rows(scale, pace, seeds)
    rows += budgets + reserve_rows(scale, options.seed)
    prefix = prefix_row(scale, options.seed)
    counters = compare_counters(MODEL, MEMORY, _load(scale, pace, options.seed), MAX_TOKENS)
    rows += [prefix, *counters]
    claims = [
        _accuracy_claim(matrix),
        Claim(id="reasoning.budget", value=most_over, op="<=", target=0, unit="tokens over a thinking budget"),
        _reserve_claim(rows),
        _prefix_claim(prefix),
        _counter_claim(counters),
    ]
    return BenchResult(name="reasoning", machine=machine, rows=rows, claims=claims)


@contextmanager
def engine_of(cell: Cell) -> Iterator[Engine]:
    """Yield the engine of a cell, warmed up."""
    engine = build_engine(MODEL, MEMORY, cell.kv, cell.weights, prefix_cache=cell.prefix_cache)
    try:
        ask(engine, questions(0, 2))
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, asked: Sequence[Question], **params: int) -> list[Outcome]:
    """Ask questions at their times; nothing of an earlier run is cached.

    Args:
        engine: who answers.
        asked: with arrival times; without, all come at once.
        params: of ``SamplingParams``, beside greedy tokens and the usual ``max_tokens``.
    """
    engine.clear_cache()
    sampling = SamplingParams(
        max_tokens=params.get("max_tokens", MAX_TOKENS),
        temperature=0.0,
        thinking_budget=params.get("thinking_budget"),
        answer_reserve=params.get("answer_reserve", 0),
    )
    return Replay(engine, sampling).run(asked)


def measure_pace(scale: Scale, seed: int) -> Pace:
    """Return rate and limits from a run of all questions at once, and of the longest of them alone."""
    with engine_of(Cell()) as engine:
        outcomes = ask(engine, questions(seed, scale.num_questions))
        seconds = max(each.times_s[-1] for each in outcomes)
        alone = ask(engine, questions(seed, 1))[0]
        token_s = alone.times_s[-1] / len(alone.times_s)
    return Pace(LOAD * scale.num_questions / seconds, Slo(SLO_SLOWDOWN * token_s * MOST_THINKING, SLO_GAP_S))


def cells(scale: Scale) -> list[Cell]:
    """Return the fraction of the matrix: codecs x prefix cache, the extreme codecs x burstiness, and other weights."""
    made = [Cell(kv=kv, prefix_cache=cache) for kv in scale.kvs for cache in (True, False)]
    ends = (scale.kvs[0], scale.kvs[-1])
    made += [Cell(kv=kv, cv=cv) for kv in ends for cv in scale.cvs if cv != 1.0]
    return made + [Cell(weights="float32", kv=kv) for kv in ends]


def matrix_rows(scale: Scale, pace: Pace, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield one row a cell."""
    todo = cells(scale)
    for engine_cell in dict.fromkeys(Cell(each.weights, each.kv, each.prefix_cache) for each in todo):
        with engine_of(engine_cell) as engine:
            for cell in todo:
                if (cell.weights, cell.kv, cell.prefix_cache) != (
                    engine_cell.weights,
                    engine_cell.kv,
                    engine_cell.prefix_cache,
                ):
                    continue
                runs = [ask(engine, _load(scale, pace, seed, cell.cv)) for seed in seeds]
                yield _report(
                    {
                        "part": "matrix",
                        "weights": cell.weights,
                        "kv": cell.kv,
                        "prefix_cache": cell.prefix_cache,
                        "cv": cell.cv,
                        **_metrics(runs, pace.slo),
                    }
                )


def budget_rows(scale: Scale, pace: Pace, seeds: Sequence[int]) -> tuple[list[Row], int]:
    """Return one row a thinking budget, and by how many tokens one was exceeded at most."""
    rows: list[Row] = []
    most_over = 0
    with engine_of(Cell()) as engine:
        for budget in scale.budgets:
            params = {} if budget is None else {"thinking_budget": budget}
            runs = [ask(engine, _load(scale, pace, seed), **params) for seed in seeds]
            if budget is not None:
                most_over = max(most_over, *(each.num_reasoning_tokens - budget for run in runs for each in run))
            rows.append(_report({"part": "budget", "thinking_budget": budget, **_metrics(runs, pace.slo)}))
    return rows, most_over


def reserve_rows(scale: Scale, seed: int) -> list[Row]:
    """Return who gets an answer within a short ``max_tokens``, without and with a reserve."""
    rows: list[Row] = []
    with engine_of(Cell()) as engine:
        for reserve in (0, RESERVE):
            params = {"max_tokens": SHORT_MAX_TOKENS, "answer_reserve": reserve}
            outcomes = ask(engine, questions(seed, 2 * scale.num_questions), **params)
            rows.append(
                {
                    "part": "reserve",
                    "max_tokens": SHORT_MAX_TOKENS,
                    "answer_reserve": reserve,
                    "num_questions": len(outcomes),
                    "answered": statistics.fmean(bool(each.answer) for each in outcomes),
                    "accuracy": statistics.fmean(each.is_correct for each in outcomes),
                }
            )
    return rows


def prefix_row(scale: Scale, seed: int) -> Row:
    """Return what the prefix cache costs where nothing is shared: CPU seconds with and without, in turns."""
    on, off = Cell(prefix_cache=True), Cell(prefix_cache=False)
    spent: dict[bool, list[float]] = {True: [], False: []}
    with engine_of(on) as with_cache, engine_of(off) as without:
        for number in range(scale.num_pairs):
            order = ((True, with_cache), (False, without))
            for is_on, engine in order if number % 2 == 0 else order[::-1]:
                started = time.process_time()
                ask(engine, questions(seed + number, scale.num_questions, shared=False))
                spent[is_on].append(time.process_time() - started)
    ratios = [on_s / off_s for on_s, off_s in zip(spent[True], spent[False], strict=True)]
    return {
        "part": "prefix",
        "num_pairs": len(ratios),
        "cpu_s_with": statistics.fmean(spent[True]),
        "cpu_s_without": statistics.fmean(spent[False]),
        "cost": statistics.median(ratios) - 1,
        "low": min(ratios) - 1,
        "high": max(ratios) - 1,
    }


def _load(scale: Scale, pace: Pace, seed: int, cv: float = 1.0) -> list[Question]:
    return arriving(questions(seed, scale.num_questions), seed, pace.rate, cv)


def _metrics(runs: Sequence[Sequence[Outcome]], slo: Slo) -> dict[str, object]:
    right, count = sum(each.is_correct for run in runs for each in run), sum(map(len, runs))
    low, high = wilson_interval(right, count)
    metrics = dict(over_runs([summary(run, slo) for run in runs]))
    return metrics | {"num_runs": len(runs), "num_questions": count, "accuracy_95": [low, high]}


def _report(row: dict[str, object]) -> Row:
    keys = ("weights", "kv", "prefix_cache", "cv", "thinking_budget")
    name = " ".join(str(row[key]) for key in keys if key in row)
    means: dict[str, Any] = {key: row[key] for key in ("accuracy", "tokens_per_s", "goodput", "ttfvt_p50_s")}
    print(
        f"{row['part']:<8}{name:<32}" + "  ".join(f"{key} {value['mean']:.3g}" for key, value in means.items()),
        file=sys.stderr,
    )
    return row


def _accuracy_claim(matrix: Sequence[Row]) -> Claim:
    row = next(each for each in matrix if each["kv"] == "plain")
    accuracy: Any = row["accuracy"]
    interval: Any = row["accuracy_95"]
    return Claim(
        id="reasoning.accuracy",
        value=accuracy["mean"],
        op=">=",
        target=0.95,
        unit="share",
        num_runs=int(str(row["num_runs"])),
        low=interval[0],
        high=interval[1],
        reason="plain KV; the interval is Wilson's, 95 %",
    )


def _reserve_claim(rows: Sequence[Row]) -> Claim:
    without, reserved = (each["answered"] for each in rows if each["part"] == "reserve")
    reason = f"max_tokens {SHORT_MAX_TOKENS}; without a reserve {without:.3f}"
    return Claim(id="reasoning.answered", value=float(str(reserved)), op=">=", target=1.0, unit="share", reason=reason)


def _prefix_claim(row: Row) -> Claim:
    cost, low, high, runs = (row[key] for key in ("cost", "low", "high", "num_pairs"))
    return Claim(
        id="reasoning.prefix_cost",
        value=float(str(cost)),
        op="<=",
        target=0.01,
        unit="share of CPU time",
        num_runs=int(str(runs)),
        low=float(str(low)),
        high=float(str(high)),
        reason="median of runs in turns, no prompt shares anything",
    )


def _counter_claim(rows: Sequence[Row]) -> Claim:
    value = max(float(str(each["difference"])) for each in rows if each["is_claimed"])
    reason = (
        "tokens and tokens of thinking; latencies are rows: theirs end at the server, the client's behind the network"
    )
    return Claim(id="reasoning.counters", value=value, op="<=", target=0.01, unit="share", reason=reason)
