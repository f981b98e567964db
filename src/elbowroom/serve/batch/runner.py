"""Runner: feeds an engine with the prompts of a batch, in the planned order, and writes answers as they end."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

from elbowroom.engine.engine import Engine
from elbowroom.engine.offline.plan import JobPlan
from elbowroom.engine.order import fresh_seed
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import Stem
from elbowroom.errors import ElbowroomError, EngineClosed, RequestError
from elbowroom.serve.batch.journal import Journal
from elbowroom.serve.batch.lines import DuplicateId, answer_line, call_of, custom_id, error_line, parse_line
from elbowroom.serve.batch.scan import Scan, check
from elbowroom.serve.batch.source import BatchInput
from elbowroom.serve.call import Call
from elbowroom.serve.context import ServerContext
from elbowroom.serve.generation import Generation

NUM_WAITING = 64
"""Requests that wait in the engine, so that it always finds one that fits; the others stay on disk."""
_POLL_S = 0.01
_WRITTEN_AT_ONCE = 256
"""Errors that are written together."""

Advance = Callable[[int, int], None]
"""Called with lines done and lines in all."""
Stems = tuple[Stem, ...] | None
News = tuple[int, RequestOutput | Exception]
"""A prompt, and how it ended."""


@dataclass(slots=True)
class _OpenLine:
    """A line of which something runs or is still to run."""

    custom_id: str
    call: Call
    generation: Generation
    num_left: int
    """Prompts that have not ended."""
    is_retry: bool = False
    error: Exception | None = None


class Runner:
    """One run of one batch.

    Args:
        source: the input.
        scan: what was found there.
        context: models and limits.
        engine: who generates.
        journal: the output.
        seed: with the line's number, of requests that bring none.
    """

    def __init__(
        self, source: BatchInput, scan: Scan, context: ServerContext, engine: Engine, journal: Journal, seed: int
    ) -> None:
        self._source, self._scan, self._context, self._engine = source, scan, context, engine
        self._journal, self._seed = journal, seed
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._open: dict[int, _OpenLine] = {}
        self._live: dict[int, Future[None]] = {}
        """Prompts that run or wait in the engine, with what tells that it has them."""
        self._again: list[int] = []
        """Lines that failed through no fault of theirs."""
        self._written: list[tuple[int, bytes, bool]] = []

    def run(self, plan: JobPlan, advance: Advance) -> None:
        """Answer everything.

        Raises:
            OutputFailed: an answer could not be written.
            EngineClosed: the engine died.
        """
        self._refuse()
        self._flush(advance)
        self._drive(plan.feed(), NUM_WAITING, advance)
        prompts: dict[int, list[int]] = {number: [] for number in self._again}
        for prompt, number in enumerate(self._scan.lines):
            if number in prompts:
                prompts[number].append(prompt)
        # A failing step ends everything that is in it: alone each shows whether it was the reason.
        for number, own in prompts.items():
            self._open[number] = self._reopen(number, own[0], is_retry=True)
            self._drive(iter([(prompt, ()) for prompt in own]), 1, advance)

    def _refuse(self) -> None:
        """Answer lines that cannot run; their errors are found again, as none was kept."""
        written = self._journal.offsets
        for number in self._scan.refused:
            if number not in written:
                data = self._source.read(number)
                self._fail(number, custom_id(data), self._error_of(data))
        for number, name in self._scan.duplicates.items():
            if number not in written:
                error = DuplicateId(f"an earlier line has the custom_id {name!r}", "give every line an id of its own")
                self._fail(number, name, error)

    def _error_of(self, data: bytes | None) -> ElbowroomError:
        try:
            call = call_of(self._context, parse_line(data, self._source.most_bytes))
            check(call, call.encode(), self._context, self._engine)
        except ElbowroomError as error:
            return error
        return self._changed()

    def _drive(self, feed: Iterator[tuple[int, Stems]], num_waiting: int, advance: Advance) -> None:
        ahead = next(feed, None)
        while ahead is not None or self._live:
            while ahead is not None and self._num_waiting() < num_waiting:
                self._submit(*ahead)
                ahead = next(feed, None)
            for prompt, outcome in self._arrived():
                self._take(prompt, outcome)
            self._flush(advance)

    def _num_waiting(self) -> int:
        """Return the requests that the engine has not begun, those included that it has not taken yet."""
        return self._engine.stats().num_waiting + sum(not accepted.done() for accepted in self._live.values())

    def _submit(self, prompt: int, stems: Stems) -> None:
        number = self._scan.lines[prompt]
        line = self._open.get(number)
        if line is None:
            line = self._open[number] = self._reopen(number, prompt - self._scan.parts[prompt])
        if line.error is not None:
            self._end(number, line, 1)
            return
        sampling = self._sampling(line, number)

        def sink(delta: OutputDelta, output: RequestOutput) -> None:
            if delta.error is not None:
                self._news.put((prompt, delta.error))
            elif output.finished:
                self._news.put((prompt, output))

        ids = line.generation.prompts[self._scan.parts[prompt]]
        _, accepted = self._engine.enqueue(ids, sampling, sink, kv=line.call.body.kv, stems=stems)
        self._live[prompt] = accepted
        accepted.add_done_callback(lambda future: self._note_refusal(prompt, future))

    def _note_refusal(self, prompt: int, accepted: Future[None]) -> None:
        error = None if accepted.cancelled() else accepted.exception()
        if isinstance(error, Exception):
            self._news.put((prompt, error))

    def _sampling(self, line: _OpenLine, number: int) -> SamplingParams:
        """Return the line's sampling, with a seed that is the same in every run of the batch."""
        sampling = line.call.sampling
        return sampling if sampling.seed is not None else replace(sampling, seed=fresh_seed(self._seed, number))

    def _arrived(self) -> list[News]:
        found = []
        try:
            found.append(self._news.get(timeout=_POLL_S))
            while True:
                found.append(self._news.get_nowait())
        except queue.Empty:
            return found

    def _take(self, prompt: int, outcome: RequestOutput | Exception) -> None:
        if self._live.pop(prompt, None) is None:
            return  # one error for each sample: the first counted
        number = self._scan.lines[prompt]
        line = self._open[number]
        if isinstance(outcome, RequestOutput):
            line.generation.take_whole(self._scan.parts[prompt], outcome)
        elif isinstance(outcome, EngineClosed):
            raise outcome
        else:
            line.error = line.error or outcome
        self._end(number, line, 1)

    def _end(self, number: int, line: _OpenLine, num_prompts: int) -> None:
        """Note that prompts of a line have ended; with the last one it is answered."""
        line.num_left -= num_prompts
        if line.num_left > 0:
            return
        del self._open[number]
        error = line.error
        if error is None:
            reply = line.call.write(line.generation)
            made = answer_line(self._journal.line_id(number), line.custom_id, reply)
            self._written.append((number, made, False))
        elif line.is_retry or isinstance(error, RequestError):
            shown = error if isinstance(error, ElbowroomError) else ElbowroomError(f"{type(error).__name__}: {error}")
            self._fail(number, line.custom_id, shown)
        else:
            self._again.append(number)

    def _reopen(self, number: int, first: int, *, is_retry: bool = False) -> _OpenLine:
        """Read a line once more; its prompts, from ``first`` on, were encoded before.

        Raises:
            RequestError: it is not what it was.
        """
        stop = first
        while stop < len(self._scan.lines) and self._scan.lines[stop] == number:
            stop += 1
        prompts = [list(self._scan.spool.tokens(prompt)) for prompt in range(first, stop)]
        try:
            line = parse_line(self._source.read(number), self._source.most_bytes)
            call = call_of(self._context, line)
            generation = call.generation(self._context, prompts)
        except ElbowroomError:
            raise self._changed() from None
        return _OpenLine(line.custom_id, call, generation, len(prompts), is_retry)

    def _changed(self) -> RequestError:
        return RequestError(f"{self._source.path} changed while it was read", "run the same command on the new input")

    def _fail(self, number: int, name: str | None, error: ElbowroomError) -> None:
        made = error_line(self._journal.line_id(number), name, number, error)
        self._written.append((number, made, True))

    def _flush(self, advance: Advance) -> None:
        while self._written:
            some, self._written = self._written[:_WRITTEN_AT_ONCE], self._written[_WRITTEN_AT_ONCE:]
            self._journal.append(some)
        advance(len(self._journal.offsets), self._scan.num_lines)
