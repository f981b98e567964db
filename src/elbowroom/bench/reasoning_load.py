"""The load of the reasoning benchmark: sums that arrive in bursts, and what happened to each of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elbowroom.bench.base import Row
from elbowroom.engine.engine import Engine
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.prompts import chat_ids
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.evals.sums import INSTRUCTION, MAX_TERMS, STEP_TOKENS, random_sum
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.workloads.arrivals import GammaArrivals
from elbowroom.workloads.base import TimedRequest
from elbowroom.workloads.metrics import Percentiles, RequestTimes, RunRecord, Targets

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """One request of the load."""

    messages: tuple[dict[str, str], ...]
    answer: str
    arrival_s: float = 0.0


def questions(seed: int, count: int, shared: bool = True) -> list[Question]:
    """Return sums of 1 to 26 terms behind a system prompt: the same for all, or random letters that nobody shares."""
    rng = np.random.default_rng([seed, 1])
    made = []
    for _ in range(count):
        example = random_sum(rng, int(rng.integers(1, MAX_TERMS + 1)))
        noise = "".join(chr(97 + letter) for letter in rng.integers(26, size=len(INSTRUCTION)).tolist())
        system = {"role": "system", "content": INSTRUCTION if shared else noise}
        made.append(Question((system, {"role": "user", "content": example.question}), example.answer))
    return made


def arriving(asked: Sequence[Question], seed: int, rate: float, cv: float) -> list[Question]:
    """Return the questions with arrival times."""
    times = GammaArrivals(rate, cv).times(len(asked), np.random.default_rng([seed, 2])).tolist()
    return [replace(each, arrival_s=at) for each, at in zip(asked, times, strict=True)]


@dataclass(slots=True)
class Outcome:
    """What happened to one question."""

    question: Question
    answer: str = ""
    num_reasoning_tokens: int = 0
    """Of thinking, marks not counted."""
    times_s: list[float] = field(default_factory=list)
    """When each token came, on the clock of ``Question.arrival_s``."""
    num_hidden: int | None = None
    """Tokens before the first visible one; None: there is none."""
    finish_reason: str | None = None
    kv_bytes: int = 0
    """Most that the KV cache held while it was answered, cached prefixes included."""

    @property
    def is_correct(self) -> bool:
        """Whether the answer is exactly the sum."""
        return self.answer == self.question.answer

    @property
    def latencies(self) -> RequestTimes:
        """What users wait for; without a visible token, all are hidden."""
        hidden = len(self.times_s) if self.num_hidden is None else self.num_hidden
        request = TimedRequest(self.question.arrival_s, 1, max(len(self.times_s), 1), num_reasoning_tokens=hidden)
        made = RequestTimes(request, has_ended=self.finish_reason is not None)
        made.add(self.times_s)
        return made

    def take(self, num_tokens: int, answer: str, now_s: float) -> None:
        """Take in what came at ``now_s``."""
        self.times_s += [now_s] * num_tokens
        if answer.strip() and self.num_hidden is None:
            self.num_hidden = max(len(self.times_s) - 1, 0)
        self.answer += answer


@dataclass(slots=True)
class Replay:
    """Asks questions at their times, whether or not the earlier ones are answered (an open loop)."""

    engine: Engine
    sampling: SamplingParams
    outcomes: list[Outcome] = field(default_factory=list)
    _open: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def run(self, asked: Sequence[Question]) -> list[Outcome]:
        """Return what happened; errors of requests are raised at the end."""
        ids = [_ids(self.engine.parts.tokenizer, each) for each in asked]
        begin, errors = time.monotonic(), list[Exception]()
        for question, prompt in zip(asked, ids, strict=True):
            outcome = Outcome(question)
            self.outcomes.append(outcome)
            time.sleep(max(begin + question.arrival_s - time.monotonic(), 0.0))
            self._ask(outcome, prompt, begin, errors)
        for _ in asked:
            if not self._open.acquire(timeout=TIMEOUT_S):
                raise TimeoutError(f"a request got no end within {TIMEOUT_S:.0f} s")
        if errors:
            raise errors[0]
        return self.outcomes

    def _ask(self, outcome: Outcome, prompt: list[int], begin: float, errors: list[Exception]) -> None:
        def sink(delta: OutputDelta, _output: RequestOutput) -> None:
            outcome.take(len(delta.token_ids), delta.answer, time.monotonic() - begin)
            outcome.num_reasoning_tokens = delta.num_reasoning_tokens
            outcome.kv_bytes = max(outcome.kv_bytes, self.engine.stats().kv_used_bytes)
            if delta.error is not None:
                errors.append(delta.error)
            if delta.finish_reason is not None:
                outcome.finish_reason = delta.finish_reason
                self._open.release()

        self.engine.submit(prompt, self.sampling, sink)


def _ids(tokenizer: Tokenizer, question: Question) -> list[int]:
    return chat_ids(tokenizer, question.messages)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user waits for: the first visible token, and the largest gap between tokens, in seconds."""

    ttfvt_s: float
    gap_s: float

    def met(self, outcome: Outcome) -> bool:
        """Return whether ``outcome`` kept both."""
        times = outcome.latencies
        return outcome.num_hidden is not None and times.ttfvt_s <= self.ttfvt_s and times.largest_gap_s <= self.gap_s


def summary(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, float]:
    """Return accuracy, service and user metrics of one run; a question without an answer counts as wrong.

    Goodput asks for correct answers within ``slo``; the other figures are those of every workload.
    """
    figures = RunRecord(requests=[each.latencies for each in outcomes]).summary(Targets())
    made = {
        "accuracy": statistics.fmean(each.is_correct for each in outcomes),
        "tokens_per_s": figures.output_tokens_per_s,
        "goodput": sum(each.is_correct and slo.met(each) for each in outcomes) / figures.makespan_s,
        "answered": statistics.fmean(bool(each.answer) for each in outcomes),
        "reasoning_tokens": statistics.fmean(each.num_reasoning_tokens for each in outcomes),
        "kv_peak_bytes": float(max(each.kv_bytes for each in outcomes)),
        "stragglers": figures.straggler,
    }
    for name in ("ttft", "ttfvt", "tpot", "e2e"):
        values: Percentiles = getattr(figures, name)
        made |= {f"{name}_p50_s": values.p50, f"{name}_p99_s": values.p99}
    return made


def over_runs(runs: Sequence[dict[str, float]]) -> Row:
    """Return the mean of every metric over runs, and the lowest and highest run."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {
        name: {
            "mean": statistics.fmean(run[name] for run in runs),
            "low": min(run[name] for run in runs),
            "high": max(run[name] for run in runs),
        }
        for name in names
    }


MOST_THINKING = STEP_TOKENS * MAX_TERMS
"""Tokens that the hardest question needs."""
