"""From token ids to text: incremental detokenisation, stop strings, and the results that users see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elbowroom.engine.thinking import MarkFinder, ThinkingTracker
from elbowroom.engine.types import FinishReason, Phase, Request, SampledToken, SequenceUpdate
from elbowroom.models.thinking import ThinkingMarks


class TextDecoder(Protocol):
    """Turns a stream of token ids into text piece by piece."""

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, which may be empty."""

    def flush(self) -> str:
        """Return what is left at the end."""


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability (natural log) of a chosen token and of the most likely ones at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SampleOutput:
    """One sample of a request, complete or so far."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    pieces: list[str] = field(default_factory=list)
    """Text in the pieces in which it came."""
    reasoning_pieces: list[str] = field(default_factory=list)
    answer_pieces: list[str] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    """Tokens of thinking, marks not counted."""

    @property
    def text(self) -> str:
        """The text so far, marks of thinking included."""
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        """What was thought so far: the text between the model's marks of thinking."""
        return "".join(self.reasoning_pieces)

    @property
    def answer(self) -> str:
        """The text outside of the thinking, without marks."""
        return "".join(self.answer_pieces)


@dataclass(slots=True)
class RequestOutput:
    """All samples of one request."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    outputs: list[SampleOutput]
    cached_tokens: int = 0
    """Prompt tokens that a cached prefix saved."""
    is_relieved: bool = False
    """Whether memory was so short that a sample went over to the engine's relief plan."""
    ttft_s: float | None = None
    """Seconds from arrival to the first token."""
    ttfvt_s: float | None = None
    """Seconds from arrival to the first visible text: the first that is not blank and no thinking."""
    duration_s: float = 0.0
    """Seconds from arrival to the newest token."""

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason is not None for sample in self.outputs)


@dataclass(slots=True)
class OutputDelta:
    """What one step added to one sample."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    error: Exception | None = None
    reasoning: str = ""
    """Of the text, what is thinking."""
    answer: str = ""
    """Of the text, what is not; marks of thinking are in neither."""
    phase: Phase = "answer"
    """What comes next, as far as one can tell."""
    num_reasoning_tokens: int = 0
    """Tokens of thinking of the sample so far."""


class SampleProcessor:
    """Detokenises one sample, watches for stop strings, and tells thinking from the answer.

    Text that could be the beginning of a stop string is held back until it is decided. Stop strings end thinking too.
    """

    def __init__(
        self, index: int, request: Request, decoder: TextDecoder | None, marks: ThinkingMarks | None = None
    ) -> None:
        sampling = request.sampling
        self.output = SampleOutput(index, logprobs=None if sampling.logprobs is None else [])
        self._decoder, self._stops = decoder, sampling.stop
        self._hold = max((len(stop) for stop in sampling.stop), default=1) - 1
        self._pending = ""
        self._tracker = self._finder = None
        if marks is not None:
            prompt = request.prompt_token_ids
            self._tracker, self._finder = ThinkingTracker(marks, prompt), MarkFinder(marks, marks.opened_by(prompt))

    def push(self, update: SequenceUpdate) -> tuple[OutputDelta, bool]:
        """Take in an update; return what to send, and whether a stop string ended the sample just now."""
        output = self.output
        delta = OutputDelta(output.index, "", [], [], update.finish_reason, update.error)
        hit = False
        for token in update.tokens:
            self._add_token(token, delta)
            if self._decoder is not None:
                hit = self._push_text(self._decoder.push(token.token_id), delta)
                if hit:
                    delta.finish_reason = "stop"
                    break
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            if self._decoder is not None and not hit:
                self._emit(self._pending + self._decoder.flush(), 0, delta)
        if delta.text:
            output.pieces.append(delta.text)
        self._split(delta)
        return delta, hit

    def _split(self, delta: OutputDelta) -> None:
        """Say which part of the new text is thinking."""
        output, tracker, finder = self.output, self._tracker, self._finder
        if tracker is None or finder is None:
            delta.answer = delta.text
        else:
            parts = finder.push(delta.text)
            if delta.finish_reason is not None:
                parts += finder.flush()
            delta.reasoning = "".join(text for inside, text in parts if inside)
            delta.answer = "".join(text for inside, text in parts if not inside)
            delta.phase, delta.num_reasoning_tokens = tracker.phase, tracker.num_reasoning
            output.num_reasoning_tokens = tracker.num_reasoning
        if delta.reasoning:
            output.reasoning_pieces.append(delta.reasoning)
        if delta.answer:
            output.answer_pieces.append(delta.answer)

    def _add_token(self, token: SampledToken, delta: OutputDelta) -> None:
        self.output.token_ids.append(token.token_id)
        if self._tracker is not None:
            self._tracker.push(token.token_id)
        delta.token_ids.append(token.token_id)
        if self.output.logprobs is not None and token.logprob is not None:
            entry = TokenLogprob(token.token_id, token.logprob, token.top_logprobs)
            self.output.logprobs.append(entry)
            delta.logprobs.append(entry)

    def _push_text(self, text: str, delta: OutputDelta) -> bool:
        """Take in the text of one token; True when a stop string is complete (its text is cut off)."""
        if not self._stops:
            delta.text += text
            return False
        return self._emit(self._pending + text, self._hold, delta)

    def _emit(self, text: str, hold: int, delta: OutputDelta) -> bool:
        """Hand out ``text`` but for the last ``hold`` characters, or up to a stop string; True in that case."""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        cut = min(found) if found else max(len(text) - hold, 0)
        delta.text += text[:cut]
        self._pending = "" if found else text[cut:]
        return bool(found)


class RequestProcessor:
    """All samples of one request: turns updates into deltas and keeps the whole output."""

    def __init__(
        self, request: Request, decoders: Sequence[TextDecoder | None], marks: ThinkingMarks | None = None
    ) -> None:
        self.request = request
        self._samples = [SampleProcessor(index, request, decoder, marks) for index, decoder in enumerate(decoders)]
        self.output = RequestOutput(request.id, request.prompt_token_ids, [each.output for each in self._samples])

    def push(self, update: SequenceUpdate, now: float) -> tuple[OutputDelta, bool]:
        """Take in an update of one sample at ``now`` (clock of ``Request.arrival_s``)."""
        self.output.duration_s = now - self.request.arrival_s
        if self.output.ttft_s is None and update.tokens:
            self.output.ttft_s = self.output.duration_s
        self.output.cached_tokens = max(self.output.cached_tokens, update.cached_tokens)
        self.output.is_relieved |= update.is_relieved
        delta, hit = self._samples[update.sample].push(update)
        if self.output.ttfvt_s is None and delta.answer.strip():
            self.output.ttfvt_s = self.output.duration_s
        return delta, hit
