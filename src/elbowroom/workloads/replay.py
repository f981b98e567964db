"""A workload on a real engine: requests are sent when their time has come; what happens is noted as in a simulation.

Open loop: nobody waits for anybody's answer. Prompts are random token ids (equal beginnings where the workload says
so), and answers are exactly as long as the workload says, whatever the model would like.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from elbowroom.engine.engine import Engine
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import ElbowroomError
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.metrics import RequestTimes, RunRecord
from elbowroom.workloads.prompts import END, TOKEN, PromptMaker
from elbowroom.workloads.turns import Turns

SAMPLE_S = 0.01
"""Between two looks at memory and queue."""
KV_OWNER = "kv"


@dataclass(slots=True)
class Replay:
    """One run on ``engine``, which nobody else uses meanwhile.

    Turns of a session are sent when their time has come and the turn before has ended.
    """

    engine: Engine
    seed: int = 0
    max_tokens: int = 4096
    """The limit that clients send, or what the model's context leaves; answers end where the workload says."""
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _open: int = 0
    _turns: Turns = field(default_factory=Turns)
    _ready: deque[int] = field(default_factory=deque)
    """Turns that waited for the turn before, which has ended."""

    def run(self, workload: Workload) -> RunRecord:
        """Replay ``workload`` in real time and return what happened."""
        prompts = PromptMaker(self.engine.parts.config.vocab_size, self.seed)
        record = RunRecord(requests=[RequestTimes(each) for each in workload.requests])
        record.timeline.counted = (KV_OWNER,)
        before, times = self.engine.stats(), self.engine.parts.core.times
        evictions, cached, prompt_tokens = before.preemptions, before.cached_prompt_tokens, before.prompt_tokens
        computed, swapped = times.prefill_tokens + times.decode_tokens, before.swapped_bytes
        started, ended = time.monotonic(), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(record, started, ended), daemon=True)
        watcher.start()
        try:
            for number, noted in enumerate(record.requests):
                self._send_turns(record, prompts, started, noted.request.arrival_s)
                with self._lock:
                    may_go = self._turns.may_go(number, noted.request)
                if may_go:
                    self._send(number, noted, prompts, started)
            self._send_turns(record, prompts, started, None)
        finally:
            ended.set()
            watcher.join()
        self._sample(record, started)
        stats = self.engine.stats()
        record.evictions, record.swapped_bytes = stats.preemptions - evictions, stats.swapped_bytes - swapped
        record.cached_prompt_tokens = stats.cached_prompt_tokens - cached
        needed = stats.prompt_tokens - prompt_tokens - record.cached_prompt_tokens
        needed += sum(max(each.num_tokens - 1, 0) for each in record.requests)
        record.recomputed_tokens = max(times.prefill_tokens + times.decode_tokens - computed - needed, 0)
        record.wall_s = time.monotonic() - started
        return record

    def _send_turns(self, record: RunRecord, prompts: PromptMaker, started: float, until_s: float | None) -> None:
        """Send turns whose session is free again, until a moment; None: until everything has ended."""
        while True:
            with self._lock:
                left = None if until_s is None else started + until_s - time.monotonic()
                if not self._ready:
                    if (left is None and self._open == 0) or (left is not None and left <= 0):
                        return
                    self._lock.wait(left)
                    continue
                number = self._ready.popleft()
            record.requests[number].sent_s = time.monotonic() - started
            self._send(number, record.requests[number], prompts, started)

    def _send(self, number: int, noted: RequestTimes, prompts: PromptMaker, started: float) -> None:
        """Send a request."""
        timed = noted.request
        with self._lock:
            tokens = prompts.tokens(number, timed)
            self._open += 1
        sampling = self._sampling(timed)
        sink = self._sink(noted, started, lambda answer: prompts.ended(timed, tokens, answer))
        session = prompts.session(timed)
        try:
            _, accepted = self.engine.enqueue(tokens, sampling, sink, session=session, tenant=timed.tenant)
            accepted.add_done_callback(lambda future: self._refused(future, noted))
        except ElbowroomError as error:
            self._end(noted, error)

    def _sampling(self, timed: TimedRequest) -> SamplingParams:
        """Force an answer of the right length that ends by itself: policies see the limit, not the length."""
        left = max(self.engine.parts.config.max_positions - timed.num_prompt_tokens, 0)
        limit = max(min(self.max_tokens, left), timed.num_output_tokens)
        forced = (TOKEN,) * (timed.num_output_tokens - 1) + (END,)
        return SamplingParams(
            max_tokens=limit, ignore_eos=True, stop_token_ids=(END,), forced=forced, temperature=0.0, seed=0
        )

    def _sink(
        self, noted: RequestTimes, started: float, ended: Callable[[list[int]], None]
    ) -> Callable[[OutputDelta, RequestOutput], None]:
        def sink(delta: OutputDelta, output: RequestOutput) -> None:
            noted.add([time.monotonic() - started] * len(delta.token_ids))
            if delta.finish_reason is not None:
                ended(output.outputs[0].token_ids)
                self._end(noted, delta.error)

        return sink

    def _refused(self, future: Future[None], noted: RequestTimes) -> None:
        error = future.exception()
        if error is not None:
            self._end(noted, error)

    def _end(self, noted: RequestTimes, error: BaseException | None) -> None:
        with self._lock:
            noted.has_ended = True
            noted.error = "" if error is None else str(error)
            self._open -= 1
            following = self._turns.ended(noted.request)
            if following is not None:
                self._ready.append(following)
            self._lock.notify_all()

    def _watch(self, record: RunRecord, started: float, ended: threading.Event) -> None:
        while not ended.wait(SAMPLE_S):
            self._sample(record, started)

    def _sample(self, record: RunRecord, started: float) -> None:
        stats = self.engine.stats()
        held = {
            owner: sum(usage["current_bytes"] for usage in tiers.values())
            for owner, tiers in self.engine.ledger().items()
        }
        record.timeline.add(time.monotonic() - started, stats.num_waiting, stats.num_running, held)
