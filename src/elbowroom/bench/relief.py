"""relief: sequences that outgrow the memory: computed again, or kept under a smaller plan?

A model of 300 million random weights in bfloat16 answers requests whose keys and values, at their ends, need twice
what is there. Once sequences that do not fit are preempted and computed again, once they go over to a relief plan
(``kv_relief``), and once all are kept under the smaller plan from the beginning. Greedy tokens are compared with those
of a run that had room for all: agreement is the share of tokens before the first that differs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.machine import machine_info
from elbowroom.bench.random_model import write_random_model
from elbowroom.engine.llm import LLM
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams

PLAN = "plain(bf16)"
RELIEFS = "int8", "kivi(4,4,32)"
SHARE = 0.5
"""Of the bytes that all sequences would hold at their ends."""
TARGET = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one run."""

    size: str = "300M"
    requests: int = 8
    prompt_tokens: int = 384
    new_tokens: int = 512

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Return random prompts."""
        drawn = np.random.default_rng(seed).integers(0, vocab_size, (self.requests, self.prompt_tokens))
        made: list[list[int]] = drawn.tolist()
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """All requests, answered once."""

    kv: str
    relief: str | None
    kv_bytes: int | None
    """Of the KV cache; None: as much as is needed."""
    kv_peak_bytes: int
    seconds: float
    longest_gap_s: float
    """Between two tokens of a request."""
    preemptions: int
    reliefs: int
    tokens: list[list[int]]

    def row(self, reference: _Run) -> Row:
        """Return what was measured."""
        shown = {name: value for name, value in asdict(self).items() if name != "tokens"}
        generated = sum(map(len, self.tokens))
        return shown | {
            "tokens_per_s": generated / self.seconds,
            "agreement": _agreement(reference.tokens, self.tokens),
        }


QUICK = Load("20M", requests=6, prompt_tokens=256, new_tokens=256)


def run(options: BenchOptions) -> BenchResult:
    """Measure a run with room for all, one without relief, each relief plan, and each plan from the beginning."""
    machine, load = machine_info(), QUICK if options.quick else Load()
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(write_random_model(Path(scratch) / "model", load.size, torch.bfloat16, options.seed))
        whole = _measure(directory, load, options.seed, PLAN, None, None)
        ways = [(PLAN, None), *((PLAN, relief) for relief in RELIEFS), *((plan, None) for plan in RELIEFS)]
        num_bytes = int(SHARE * whole.kv_peak_bytes)
        runs = [_measure(directory, load, options.seed, *way, num_bytes) for way in ways]
    rows = [each.row(whole) for each in (whole, *runs)]
    return BenchResult(name="relief", machine=machine, rows=rows, claims=_claims(runs[0], runs[1 : 1 + len(RELIEFS)]))


def _measure(directory: str, load: Load, seed: int, plan: str, relief: str | None, kv_bytes: int | None) -> _Run:
    """Answer all requests in ``kv_bytes`` of KV cache (None: as much as they need)."""
    sampling = SamplingParams(max_tokens=load.new_tokens, temperature=0.0, ignore_eos=True)
    with LLM(directory, "6GiB", plan, kv_relief=relief, prefix_cache=False) as llm:
        parts = llm.engine.parts
        if kv_bytes is not None:
            others = parts.ledger.total("host") - parts.ledger.held("kv", "host")
            llm.engine.set_budget(others + kv_bytes)
        started = time.perf_counter()
        answers = [_Answer() for _ in range(load.requests)]
        for answer, prompt in zip(answers, load.prompts(parts.config.vocab_size, seed), strict=True):
            llm.engine.submit(prompt, sampling, answer)
        tokens = [answer.done.result() for answer in answers]
        seconds = time.perf_counter() - started
        stats, peak = llm.engine.stats(), parts.ledger.snapshot()["kv"]["host"]["peak_bytes"]
    sys.stderr.write(f"  {plan} -> {relief}: {seconds:.1f} s, {stats.preemptions} preempted\n")
    return _Run(
        kv=plan,
        relief=relief,
        kv_bytes=kv_bytes,
        kv_peak_bytes=peak,
        seconds=seconds,
        longest_gap_s=max(answer.longest_gap_s for answer in answers),
        preemptions=stats.preemptions,
        reliefs=stats.reliefs,
        tokens=tokens,
    )


class _Answer:
    """Takes the tokens of a request and notes how long it waited for one."""

    def __init__(self) -> None:
        self.done: Future[list[int]] = Future()
        self.longest_gap_s = 0.0
        self._last: float | None = None

    def __call__(self, delta: OutputDelta, output: RequestOutput) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self._last = now
        if delta.error is not None:
            self.done.set_exception(delta.error)
        elif output.finished:
            self.done.set_result(output.outputs[0].token_ids)


def _agreement(reference: list[list[int]], made: list[list[int]]) -> float:
    """Return the share of tokens before the first one that differs, the mean over requests."""
    shares = []
    for ours, theirs in zip(made, reference, strict=True):
        equal = np.asarray(ours) == np.asarray(theirs)
        shares.append(1.0 if equal.all() else int(equal.argmin()) / equal.size)
    return float(np.mean(shares))


def _claims(without: _Run, reliefs: list[_Run]) -> list[Claim]:
    """Return how much shorter the longest wait for a token gets, and how many preemptions are left."""
    gaps = [each.longest_gap_s / without.longest_gap_s for each in reliefs]
    times = [each.seconds / without.seconds for each in reliefs]
    before, after = without.preemptions, max(each.preemptions for each in reliefs)
    shown = zip(RELIEFS, gaps, times, strict=True)
    return [
        Claim(
            id="relief.gap",
            value=max(gaps),
            op="<=",
            target=TARGET,
            unit="longest wait for a token of a running request, with relief / without",
            reason="; ".join(f"{name}: {gap:.2f}, seconds in all {time_:.2f}" for name, gap, time_ in shown),
        ),
        Claim(
            id="relief.preemptions",
            value=after / before if before else None,
            op="<=",
            target=TARGET,
            unit="sequences computed again with relief / without",
            reason=f"{after} of {before}",
        ),
    ]
