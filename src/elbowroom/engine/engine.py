"""Engine: one loaded model inside one memory budget, on a thread of its own; what LLM, AsyncLLM and servers share.

Every public method may be called from any thread; the work happens on the engine's thread, between steps.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from elbowroom.engine.core import EngineCore, Sink
from elbowroom.engine.output import OutputDelta, RequestOutput, TextDecoder
from elbowroom.engine.plans import KVPlans, PlanText
from elbowroom.engine.queue import Gate, view_queue
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.sizing import MemoryPlan
from elbowroom.engine.thinking import check_thinking
from elbowroom.engine.types import Request, SchedulerStats, SessionRef, Stem
from elbowroom.errors import EngineClosed, Overloaded, RequestError, TokenizerError
from elbowroom.kv.base import KVReport, KVStore
from elbowroom.kv.bound import BoundPlan
from elbowroom.memory.ledger import Ledger, Usage
from elbowroom.memory.meter import Meter
from elbowroom.models.config import ModelConfig
from elbowroom.models.loader import LoadReport
from elbowroom.models.thinking import ThinkingMarks
from elbowroom.models.tokenizer import Tokenizer

T = TypeVar("T")
IDLE_POLL_S = 0.25
"""While free pages wait to be given back, the idle engine looks this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What ``build_engine`` puts together."""

    model_name: str
    config: ModelConfig
    tokenizer: Tokenizer
    memory: MemoryPlan
    plans: KVPlans
    """Those that requests may ask for."""
    plan: BoundPlan
    """The usual one."""
    ledger: Ledger
    store: KVStore
    core: EngineCore
    meter: Meter
    load: LoadReport
    close: Callable[[], None]
    """Gives all memory back."""


class Engine:
    """Runs requests of one model on its own thread.

    Args:
        parts: model, memory and step loop.
        max_queue: most requests that may be live at once; more are refused.
    """

    def __init__(self, parts: EngineParts, max_queue: int = 4096) -> None:
        self.parts = parts
        self._core = parts.core
        self._max_queue = max_queue
        self._ids = itertools.count(1)
        self._session_keys = itertools.count(1)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = self._ended = False
        """Whether the end was asked for, and whether the thread takes no more commands."""
        self._posting = threading.Lock()
        """Held while a command is queued, so that none is queued behind the end."""
        self._thread = threading.Thread(target=self._run, name="elbowroom-engine", daemon=True)
        self._thread.start()

    # Requests

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        session: SessionRef | None = None,
        kv: PlanText = None,
        tenant: str = "",
        priority: int = 0,
        admission: str | None = None,
        deadline_s: float | None = None,
        salt: bytes = b"",
    ) -> int:
        """Queue a request and return its id once it is accepted; ``sink`` gets every delta on the engine's thread.

        With ``kv`` it asks for one of the engine's KV plans, and keeps that; with ``admission`` for another admission
        policy than the engine's. ``deadline_s`` says in how many seconds its first token is due, to the order ``slo``.

        Raises:
            PlanError: ``kv`` cannot be read, or there is no such admission policy.
            RequestError: malformed, under a plan that the engine does not have, too long for the context, too large
                for the budget, or with limits on thinking for a model without marks of it.
            Overloaded: too many requests are live.
            EngineClosed: the engine was shut down.
            TokenizerError: stop strings are given and the model has no tokenizer.
        """
        request_id, accepted = self.enqueue(
            prompt_token_ids,
            sampling,
            sink,
            session=session,
            kv=kv,
            tenant=tenant,
            priority=priority,
            admission=admission,
            deadline_s=deadline_s,
            salt=salt,
        )
        accepted.result()
        return request_id

    def enqueue(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        session: SessionRef | None = None,
        kv: PlanText = None,
        tenant: str = "",
        priority: int = 0,
        admission: str | None = None,
        deadline_s: float | None = None,
        salt: bytes = b"",
        gate: Gate | None = None,
        stems: tuple[Stem, ...] | None = None,
    ) -> tuple[int, Future[None]]:
        """Queue a request and return its id at once, with a future that ends when it is accepted.

        What ``submit`` raises is raised here or by the future, which can be cancelled; ``abort`` may come at any time.
        ``gate`` sees the queue before the request enters and may raise Overloaded.
        ``stems`` are what it shares with requests to come, as in ``Request``.
        """
        now = time.monotonic()
        request = Request(
            id=next(self._ids),
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=sampling,
            arrival_s=now,
            tenant=tenant,
            priority=priority,
            deadline_s=None if deadline_s is None else now + deadline_s,
            salt=salt,
            session=session,
            plan=self.parts.plans.number(kv),
            keeps_plan=kv is not None,
            admission=admission,
            stems=stems,
        )
        self.check_deadline(deadline_s)
        tokenizer = self.parts.tokenizer
        for ids in (request.prompt_token_ids, request.sampling.forced):
            tokenizer.check_ids(ids, self.parts.config.vocab_size)
        if sampling.stop and not tokenizer.available:
            raise TokenizerError("stop strings need a tokenizer, and the model has none", "use stop_token_ids")
        marks = self._core.marks
        check_thinking(sampling, marks)
        shown = frozenset() if marks is None else marks.special_ids
        decoders = [tokenizer.stream_decoder(shown=shown) for _ in range(sampling.n)]
        return request.id, self.call(lambda: self._add(request, decoders, sink, gate))

    @property
    def heeds_deadlines(self) -> bool:
        """Whether requests are served by their deadlines."""
        return self._core.scheduler.order_name == "slo"

    def check_deadline(self, deadline_s: float | None) -> None:
        """Check that the engine would heed a deadline in so many seconds.

        Raises:
            RequestError: it does not serve by deadline, or that is no time from now.
        """
        order = self._core.scheduler.order_name
        if deadline_s is not None and not self.heeds_deadlines:
            text = f"deadline_s means nothing to the order {order!r}"
            raise RequestError(text, 'leave it out, or start the engine with the order "slo" (--order slo)')
        if deadline_s is not None and not 0 < deadline_s < math.inf:
            raise RequestError(f"deadline_s must be above 0, not {deadline_s:g}", "give seconds until the first token")

    def is_waiting(self, request_ids: Collection[int]) -> Future[bool]:
        """Return a future that says whether some of these requests have not ended and none of them has begun."""

        def look() -> bool:
            waiting, running = self._core.scheduler.queues
            waits = any(seq.request.id in request_ids and not seq.num_generated for seq in waiting)
            return waits and not any(seq.request.id in request_ids for seq in running)

        return self.call(look)

    def _add(self, request: Request, decoders: Sequence[TextDecoder | None], sink: Sink, gate: Gate | None) -> None:
        if self._core.num_live >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests are waiting or running", "retry later")
        if gate is not None:
            self._core.scheduler.most_new_tokens(request)  # one that never fits is told so, however long the queue
            gate(view_queue(self._core.scheduler, request.tenant))
        self._core.add(request, decoders, sink)

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        session: SessionRef | None = None,
        kv: PlanText = None,
        admission: str | None = None,
    ) -> Future[RequestOutput]:
        """Queue a request and return a future of its whole output; errors as in ``submit``.

        Cancelling the future drops the request at its next token.
        """
        done: Future[RequestOutput] = Future()

        def sink(delta: OutputDelta, output: RequestOutput) -> None:
            if done.cancelled():
                self._core.abort(output.request_id)
            if done.done():
                return
            if delta.error is not None:
                done.set_exception(delta.error)
            elif output.finished:
                done.set_result(output)

        self.submit(prompt_token_ids, sampling, sink, session=session, kv=kv, admission=admission)
        return done

    def abort(self, request_id: int) -> None:
        """Drop a request; returns at once. One that has ended, or whose engine was closed, is no error."""
        self._tell(lambda: self._core.abort(request_id))

    def new_session_key(self) -> int:
        """Return a key for a parked sequence."""
        return next(self._session_keys)

    def close_session(self, key: int) -> None:
        """Forget a parked sequence; returns at once. It is no error if the engine was closed."""
        self._tell(lambda: self._core.scheduler.close_session(key))

    # Memory and state

    def clear_cache(self) -> int:
        """Forget all cached prefixes and parked sessions and return the bytes given back."""
        return self.call(self._core.clear_cache).result()

    def set_budget(self, num_bytes: int) -> None:
        """Change the memory budget of the running engine.

        Raises:
            OutOfBudget: weights, workspace and reserve alone need more.
        """
        self.call(lambda: self._core.set_budget("host", num_bytes)).result()

    def ledger(self) -> dict[str, dict[str, Usage]]:
        """Return bytes by owner and tier."""
        return self.parts.ledger.snapshot()

    def stats(self) -> SchedulerStats:
        """Return the scheduler's counters and gauges."""
        return self._core.scheduler.stats()

    def kv_report(self) -> KVReport:
        """Return what the KV store holds."""
        return self.call(self.parts.store.report).result()

    def check_integrity(self) -> None:
        """Raise unless the books of scheduler and store agree."""

        def check() -> None:
            self._core.scheduler.check()
            self.parts.store.check_integrity()

        self.call(check).result()

    @property
    def thinking_marks(self) -> ThinkingMarks | None:
        """The texts between which the model thinks, if it does."""
        return self._core.marks

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread takes commands."""
        return not self._ended

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the engine's thread between two steps, unless the future is cancelled before."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._ended:
                future.set_exception(EngineClosed("the engine was shut down"))
                return
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  it belongs to the caller, who gets it from the future
                future.set_exception(error)

        self._post(run)
        return future

    def close(self) -> None:
        """Stop the thread, ending live requests, and give all memory back; later calls do nothing."""
        with self._posting:
            if self._closed:
                return
            self._closed = True
            self._commands.put(None)
        self._thread.join()
        self.parts.close()

    # The thread

    def _tell(self, command: Callable[[], object]) -> None:
        with contextlib.suppress(EngineClosed):
            self.call(command)

    def _post(self, command: Callable[[], None]) -> None:
        with self._posting:
            if self._closed or self._ended:
                raise EngineClosed("the engine was shut down")
            self._commands.put(command)

    def _run(self) -> None:
        try:
            self._work()
        finally:  # also when the thread dies: nobody may wait for it
            self._end()

    def _end(self) -> None:
        """End all live requests and refuse all commands, those that wait included."""
        with self._posting:
            self._ended = True
        try:
            self._core.fail(EngineClosed("the engine was shut down"))
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    command = self._commands.get_nowait()
                    if command is not None:
                        command()

    def _work(self) -> None:
        while self._run_commands():
            try:
                if self._core.has_work():
                    self._core.step()
                else:
                    self._core.idle()
            except Exception as error:  # noqa: BLE001  a bug here must end requests with its text, not hang them
                self._core.fail(error)

    def _run_commands(self) -> bool:
        """Run what has arrived, waiting for something when there is no other work; False at the end."""
        block = not self._core.has_work()
        while True:
            timeout = IDLE_POLL_S if self._core.arena.free_bytes() else None
            try:
                command = self._commands.get(block, timeout)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False
