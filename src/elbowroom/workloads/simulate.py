"""A workload on the scheduler and the simulated executor: hours of a trace in seconds, on a clock of its own.

The scheduler is the one that serves; only the time that steps take is computed instead of spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from elbowroom.engine.executors.base import CostModel
from elbowroom.engine.executors.simulated import SimExecutor
from elbowroom.engine.executors.simulated_transfers import SimTransfers
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler
from elbowroom.engine.types import Request, SequenceUpdate, StepPlan, StepResult
from elbowroom.errors import ElbowroomError, RequestError
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.metrics import RequestTimes, RunRecord
from elbowroom.workloads.prompts import END, TOKEN, PromptMaker
from elbowroom.workloads.turns import Turns

VOCAB = 1 << 15
_STUCK = 1000
"""Steps without a token of time, after which something is wrong."""


@dataclass(slots=True)
class Simulation:
    """One run.

    Args:
        scheduler: as it shall be tested, without requests; ``END`` must be one of its ``eos_token_ids``.
        cost: what steps take.
        max_tokens: the limit that clients send, or what the context leaves; answers end where the workload says.
        transfers: prices of saving and loading sequences, where the scheduler's preemption policy saves any.
        on_progress: called with the number of requests that ended.
    """

    scheduler: Scheduler
    cost: CostModel
    max_tokens: int = 4096
    transfers: SimTransfers | None = None
    on_progress: Callable[[int], None] | None = None
    _now: float = 0.0
    _computed: int = 0
    _needed: int = 0
    _ended: int = 0
    _prompts: PromptMaker = field(default_factory=lambda: PromptMaker(VOCAB))
    _turns: Turns = field(default_factory=Turns)
    _tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def run(self, workload: Workload) -> RunRecord:
        """Replay ``workload`` and return what happened."""
        started, scheduler = time.perf_counter(), self.scheduler
        executor = SimExecutor(self.cost, TOKEN, END, self.transfers)
        record = RunRecord(requests=[RequestTimes(each) for each in workload.requests])
        pending, idle = 0, 0
        while pending < len(record.requests) or scheduler.has_work():
            pending = self._arrive(record, pending)
            upcoming = record.requests[pending].request.arrival_s if pending < len(record.requests) else None
            if not scheduler.has_work():
                if upcoming is not None:
                    self._sample(record)
                    self._now = upcoming
                continue
            plan = scheduler.schedule(self._now)
            executor.stop_after_s = None if upcoming is None else upcoming - self._now
            result = executor.collect(executor.submit(plan))
            idle = 0 if plan.rows or result.moved else idle + 1
            if idle > _STUCK:
                raise ElbowroomError(f"the simulation is stuck at {self._now:.3f} s with {scheduler.stats()}")
            self._sample(record)
            self._take(record, plan, result, scheduler.update(result))
        self._sample(record)
        stats = scheduler.stats()
        record.evictions, record.swapped_bytes = stats.preemptions, stats.swapped_bytes
        record.cached_prompt_tokens = stats.cached_prompt_tokens
        record.recomputed_tokens = max(
            self._computed - self._needed - stats.prompt_tokens + stats.cached_prompt_tokens, 0
        )
        record.wall_s = time.perf_counter() - started
        return record

    def _arrive(self, record: RunRecord, number: int) -> int:
        """Add all requests that have come; return the number of the next."""
        requests = record.requests
        while number < len(requests) and requests[number].request.arrival_s <= self._now:
            if self._turns.may_go(number, requests[number].request):
                self._send(record, number)
            number += 1
        return number

    def _send(self, record: RunRecord, number: int | None) -> None:
        """Send a request; where it is refused, the next turn of its session instead."""
        while number is not None:
            noted = record.requests[number]
            try:
                self.scheduler.add(self._request(number, noted.request))
                return
            except RequestError as error:
                noted.error = error.message
                self._ended += 1
                number = self._next_turn(record, noted, self._now)

    def _next_turn(self, record: RunRecord, ended: RequestTimes, now: float) -> int | None:
        """Return the turn that waited for the end of another one."""
        number = self._turns.ended(ended.request)
        if number is not None:
            record.requests[number].sent_s = now
        return number

    def _request(self, number: int, timed: TimedRequest) -> Request:
        """Only turns of sessions have tokens of their own; else block keys alone say which prompts begin alike."""
        keys: tuple[bytes, ...] | None = timed.block_keys or ()
        tokens: tuple[int, ...] = (TOKEN,) * timed.num_prompt_tokens
        if timed.session is not None:
            tokens, keys = self._prompts.tokens(number, timed), None
            self._tokens[number] = tokens
        return Request(
            id=number,
            prompt_token_ids=tokens,
            sampling=SamplingParams(max_tokens=self._limit(timed), seed=0),
            arrival_s=timed.arrival_s,
            tenant=timed.tenant,
            block_keys=keys,
            session=self._prompts.session(timed),
            num_output_tokens=timed.num_output_tokens,
        )

    def _limit(self, timed: TimedRequest) -> int:
        left = max(self.scheduler.config.max_positions - timed.num_prompt_tokens, 0)
        return max(min(self.max_tokens, left), timed.num_output_tokens)

    def _take(self, record: RunRecord, plan: StepPlan, result: StepResult, updates: list[SequenceUpdate]) -> None:
        ends = [self._now + end for end in result.step_ends_s]
        for update in updates:
            times = record.requests[update.request_id]
            times.add(ends if len(update.tokens) == len(ends) else ends[: len(update.tokens)])
            if update.finish_reason is not None:
                self._end(update, times)
                self._send(record, self._next_turn(record, times, max(times.last_s, self._now)))
        self._now += result.duration_s
        self._computed += plan.num_tokens * result.num_steps

    def _end(self, update: SequenceUpdate, times: RequestTimes) -> None:
        times.has_ended = True
        if update.error is not None or update.finish_reason not in ("stop", "length"):
            times.error = str(update.error or update.finish_reason)
        self._needed += max(times.num_tokens - 1, 0)
        self._ended += 1
        if times.request.session is not None:
            tokens = self._tokens.pop(update.request_id)
            self._prompts.ended(times.request, tokens, [TOKEN] * (times.num_tokens - 1) + [END])
        if self.on_progress is not None:
            self.on_progress(self._ended)

    def _sample(self, record: RunRecord) -> None:
        stats, account = self.scheduler.stats(), self.scheduler.account
        held = {"sequences": account.used_bytes, "prefix cache": account.cached_bytes}
        record.timeline.add(self._now, stats.num_waiting, stats.num_running, held)
