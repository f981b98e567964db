"""EngineCore: the step loop around scheduler and executor, with the books of memory. Runs on one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from elbowroom.engine.executors.base import Executor
from elbowroom.engine.output import OutputDelta, RequestOutput, RequestProcessor, TextDecoder
from elbowroom.engine.scheduler import Scheduler
from elbowroom.engine.types import Request, SequenceUpdate
from elbowroom.errors import ElbowroomError, OutOfBudget
from elbowroom.memory.arena import Arena
from elbowroom.memory.malloc import trim_malloc
from elbowroom.memory.reclaim import ReclaimerLadder
from elbowroom.models.thinking import ThinkingMarks

_log = logging.getLogger(__name__)

Sink = Callable[[OutputDelta, RequestOutput], None]
"""Gets every delta of a request and its output so far, on the engine's thread."""


@dataclass(slots=True)
class StepTimes:
    """Seconds and tokens of the steps so far, for metrics and the run report."""

    num_steps: int = 0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    schedule_s: float = 0.0


@dataclass(slots=True)
class _Live:
    processor: RequestProcessor
    sink: Sink
    open_samples: int


class CacheReclaimer:
    """The ladder's lossless rung: cached prefixes and parked sessions."""

    name = "prefix cache"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def reclaimable(self) -> int:
        """Return bytes of unused cached prefixes and parked sessions."""
        return self._scheduler.account.reclaimable_bytes

    def reclaim(self, num_bytes: int, lossless_only: bool) -> int:
        """Give up the least recently used first; the bytes are free once the executor has applied the next plan."""
        return self._scheduler.account.reclaim(num_bytes)


@dataclass(slots=True)
class EngineCore:
    """Owns scheduler and executor; ``step`` is the only place that orders things."""

    scheduler: Scheduler
    executor: Executor
    arena: Arena
    ladder: ReclaimerLadder = field(default_factory=ReclaimerLadder)
    times: StepTimes = field(default_factory=StepTimes)
    clock: Callable[[], float] = time.monotonic
    reset_executor: Callable[[], None] = lambda: None
    """Drops every stored sequence after a failed step."""
    resize_store: Callable[[int], object] = lambda _num_bytes: None
    """Sets the bytes that the KV store may hold."""
    max_kv_bytes: int | None = None
    """Address space of the KV store: a raised budget gives it no more than this."""
    marks: ThinkingMarks | None = None
    """Between which the model thinks, if it does."""
    _live: dict[int, _Live] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hang the prefix cache on the ladder."""
        self.ladder.add(CacheReclaimer(self.scheduler))

    def add(self, request: Request, decoders: Sequence[TextDecoder | None], sink: Sink) -> None:
        """Queue a request; ``sink`` gets its deltas.

        Raises:
            RequestError: it is malformed or can never fit.
        """
        self.scheduler.add(request)
        self._live[request.id] = _Live(RequestProcessor(request, decoders, self.marks), sink, request.sampling.n)

    def abort(self, request_id: int) -> None:
        """Drop a request; its memory is free after the next step."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Return whether ``step`` would do something."""
        return self.scheduler.has_work()

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def step(self) -> None:
        """Schedule, execute and deliver one step; a failing step ends its requests, not the engine."""
        missing_bytes = -self.scheduler.account.free_bytes
        if (
            missing_bytes > 0
        ):  # the budget was lowered: whoever can give up bytes does so before sequences are preempted
            self.ladder.relieve(missing_bytes)
        started = self.clock()
        plan = self.scheduler.schedule(started)
        self.times.schedule_s += self.clock() - started
        try:
            result = self.executor.collect(self.executor.submit(plan))
        except Exception as error:  # noqa: BLE001  whatever a model or kernel raises must not stop the engine
            self.fail(error)
            return
        self._count(
            plan.num_tokens * result.num_steps, all(row.kind == "decode" for row in plan.rows), result.duration_s
        )
        self._deliver(self.scheduler.update(result))

    def idle(self) -> None:
        """Called while there is nothing to do: give idle pages back."""
        self.arena.trim()

    def clear_cache(self) -> int:
        """Forget cached prefixes and parked sessions and give their pages back now; return the bytes freed."""
        before = self.arena.ledger.total(self.arena.tier.name)
        self.scheduler.account.reclaim(2**62)
        if self.scheduler.has_work():
            self.step()
        self.arena.trim(0.0)
        trim_malloc()
        return before - self.arena.ledger.total(self.arena.tier.name)

    def set_budget(self, tier: str, num_bytes: int) -> None:
        """Change the memory budget while running; the KV cache takes the difference, at once.

        Requests that cannot run in what is left end with an error.

        Raises:
            OutOfBudget: the rest alone holds more; nothing changes then.
        """
        ledger = self.arena.ledger
        others = ledger.total(tier) - ledger.held("kv", tier) - ledger.held("arena.free", tier)
        if num_bytes < others:
            raise ledger.refusal("kv", tier, others - num_bytes)
        capacity_bytes = min(num_bytes - others, self.max_kv_bytes or num_bytes)
        ledger.budget.set(tier, max(num_bytes, ledger.budget.limit(tier) or 0))
        self.resize_store(capacity_bytes)
        self.scheduler.account.capacity_bytes = capacity_bytes
        self.step()
        self.arena.trim(0.0)
        ledger.budget.set(tier, num_bytes)

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        now = self.clock()
        for update in updates:
            live = self._live.get(update.request_id)
            if live is None:
                continue
            delta, stopped = live.processor.push(update, now)
            if stopped:
                self.scheduler.finish_sample(update.request_id, update.sample)
            if delta.finish_reason is not None:
                live.open_samples -= 1
                if live.open_samples == 0:
                    del self._live[update.request_id]
            try:
                live.sink(delta, live.processor.output)
            except Exception:  # noqa: BLE001  the caller's own code must not stop anybody else's request
                _log.exception("the receiver of request %d failed; the request is dropped", update.request_id)
                self._live.pop(update.request_id, None)
                self.scheduler.abort(update.request_id)

    def fail(self, error: Exception) -> None:
        """End every request with ``error`` and start from an empty store."""
        shown = error if isinstance(error, ElbowroomError) else _explain(error)
        updates = self.scheduler.fail_all(shown)
        self.reset_executor()
        self._deliver(updates)

    def _count(self, num_tokens: int, is_decode: bool, seconds: float) -> None:
        if num_tokens == 0:
            return  # it waited for a transfer, or only changed what is stored
        self.times.num_steps += 1
        if is_decode:
            self.times.decode_s += seconds
            self.times.decode_tokens += num_tokens
        else:
            self.times.prefill_s += seconds
            self.times.prefill_tokens += num_tokens


def _explain(error: Exception) -> ElbowroomError:
    """Wrap an unexpected error so that the user sees which step failed and why."""
    if isinstance(error, MemoryError):
        return OutOfBudget("the operating system refused memory during a step", "lower memory= (--memory)")
    return ElbowroomError(f"a step failed: {type(error).__name__}: {error}")
