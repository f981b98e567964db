"""What a run of a workload was like, defined once for simulated and real runs.

For a request that arrives at ``a`` with tokens at ``t_1 .. t_n``, of which the first ``r`` are hidden reasoning:
TTFT = t_1 - a; TTFVT (first visible token) = t_{r+1} - a; TPOT = (t_n - t_1) / (n - 1); E2E = t_n - a; the largest gap
is that between two tokens of it (after Li et al., ICLR 2026, arXiv 2510.18672). Tokens are counted as the engine
samples them, never as messages of a stream, and prompt tokens are no output. A request that failed, or was refused, is
one that met no target: it counts in ``num_failed`` and in the makespan, never as a latency.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from elbowroom.workloads.base import TimedRequest
from elbowroom.workloads.timeline import Timeline


@dataclass(slots=True)
class RequestTimes:
    """What is noted of one request while its tokens come."""

    request: TimedRequest
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    first_visible_s: float | None = None
    largest_gap_s: float = 0.0
    has_ended: bool = False
    sent_s: float | None = None
    """When it was sent, where it had to wait for the turn before; None: when it arrived."""
    error: str = ""
    """Why it was refused or failed."""

    def add(self, times: Sequence[float]) -> None:
        """Note tokens that came at ``times``, ascending, in seconds on the workload's clock."""
        if not times:
            return
        hidden = self.request.num_reasoning_tokens
        if self.first_visible_s is None and self.num_tokens + len(times) > hidden:
            self.first_visible_s = times[hidden - self.num_tokens]
        before = self.last_s
        if self.num_tokens == 0:
            self.first_s = before = times[0]
        within = max(map(operator.sub, times[1:], times), default=0.0)
        self.largest_gap_s = max(self.largest_gap_s, times[0] - before, within)
        self.last_s = times[-1]
        self.num_tokens += len(times)

    @property
    def is_answered(self) -> bool:
        """Whether it ended as it should."""
        return self.has_ended and not self.error and self.num_tokens > 0

    @property
    def start_s(self) -> float:
        """When it was sent."""
        return self.request.arrival_s if self.sent_s is None else self.sent_s

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.start_s

    @property
    def ttfvt_s(self) -> float:
        """Seconds to the first visible token; without one, to the last token."""
        shown = self.last_s if self.first_visible_s is None else self.first_visible_s
        return shown - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token behind the first; None for an answer of one token."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def e2e_s(self) -> float:
        """Seconds to the last token."""
        return self.last_s - self.start_s


@dataclass(frozen=True, slots=True)
class Targets:
    """Service level objective of a request."""

    ttft_s: float = 10.0
    gap_s: float = 1.5
    """Between any two tokens of it."""

    def met_by(self, times: RequestTimes) -> bool:
        """Return whether a request was answered in time."""
        return times.is_answered and times.ttft_s <= self.ttft_s and times.largest_gap_s <= self.gap_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of seconds, over answered requests; NaN where there are none."""

    p50: float
    p90: float
    p99: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Return the percentiles of ``values``."""
        if not values:
            nothing = float("nan")
            return cls(nothing, nothing, nothing, nothing, nothing)
        made = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = np.percentile(made, (50, 90, 99)).tolist()
        return cls(p50, p90, p99, float(made.mean()), float(made.max()))


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """All that was noted of one run."""

    requests: list[RequestTimes]
    timeline: Timeline = field(default_factory=Timeline)
    swapped_bytes: int = 0
    """Written for sequences that had to go or whose turn had ended, and read back."""
    evictions: int = 0
    """Times that a running sequence lost its memory and had to come back."""
    recomputed_tokens: int = 0
    """Computed more than once."""
    cached_prompt_tokens: int = 0
    """Prompt tokens that a cached prefix saved."""
    wall_s: float = 0.0
    """How long the run took to make: of a simulation, far less than its makespan."""

    def summary(self, targets: Targets) -> RunSummary:
        """Return the figures of the run."""
        return RunSummary.of(self, targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Figures of a run."""

    num_requests: int
    num_answered: int
    num_failed: int
    num_good: int
    """Answered within their targets."""
    makespan_s: float
    """From the first arrival to the last token."""
    goodput: float
    """Good requests a second of the makespan."""
    requests_per_s: float
    output_tokens_per_s: float
    ttft: Percentiles
    ttfvt: Percentiles
    tpot: Percentiles
    largest_gap: Percentiles
    e2e: Percentiles
    straggler: float
    """Longest over median E2E."""
    evictions: int
    swapped_bytes: int
    recomputed_tokens: int
    cached_prompt_tokens: int
    peak_kv_bytes: int
    mean_kv_bytes: float
    std_kv_bytes: float
    mean_waiting: float
    most_waiting: int
    most_running: int

    @classmethod
    def of(cls, record: RunRecord, targets: Targets) -> RunSummary:
        """Return the figures of ``record``."""
        answered = [each for each in record.requests if each.is_answered]
        first = min((each.request.arrival_s for each in record.requests), default=0.0)
        last = max((each.last_s for each in record.requests if each.num_tokens), default=first)
        makespan = max(last - first, 1e-9)
        good = sum(targets.met_by(each) for each in answered)
        e2e, timeline = Percentiles.of([each.e2e_s for each in answered]), record.timeline
        kv = timeline.statistics()
        return cls(
            num_requests=len(record.requests),
            num_answered=len(answered),
            num_failed=len(record.requests) - len(answered),
            num_good=good,
            makespan_s=makespan,
            goodput=good / makespan,
            requests_per_s=len(answered) / makespan,
            output_tokens_per_s=sum(each.num_tokens for each in record.requests) / makespan,
            ttft=Percentiles.of([each.ttft_s for each in answered]),
            ttfvt=Percentiles.of([each.ttfvt_s for each in answered]),
            tpot=Percentiles.of([tpot for each in answered if (tpot := each.tpot_s) is not None]),
            largest_gap=Percentiles.of([each.largest_gap_s for each in answered]),
            e2e=e2e,
            straggler=e2e.most / e2e.p50 if e2e.p50 else float("nan"),
            evictions=record.evictions,
            swapped_bytes=record.swapped_bytes,
            recomputed_tokens=record.recomputed_tokens,
            cached_prompt_tokens=record.cached_prompt_tokens,
            peak_kv_bytes=int(kv.most),
            mean_kv_bytes=kv.mean,
            std_kv_bytes=kv.std,
            mean_waiting=timeline.mean_waiting,
            most_waiting=max(timeline.waiting, default=0),
            most_running=max(timeline.running, default=0),
        )
