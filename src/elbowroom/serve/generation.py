"""Generation: everything one HTTP request lets an engine generate, with its usage and timings."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from elbowroom.engine.output import OutputDelta, RequestOutput, TokenLogprob
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.thinking import check_thinking
from elbowroom.errors import ElbowroomError
from elbowroom.serve.callers import Caller
from elbowroom.serve.errors import InvalidField
from elbowroom.serve.metrics import ServerMetrics
from elbowroom.serve.requests import RENAMED
from elbowroom.serve.responses import Usage
from elbowroom.serve.served import ServedModel


@dataclass(slots=True)
class Choice:
    """One of the asked-for texts: complete, or as far as it was generated."""

    index: int
    prompt_index: int
    pieces: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    reasoning_pieces: list[str] = field(default_factory=list)
    answer_pieces: list[str] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    first_s: float = 0.0
    visible_s: float = 0.0
    """When the first text came that is not blank and no thinking; 0: never."""
    last_s: float = 0.0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        """What was thought so far."""
        return "".join(self.reasoning_pieces)

    @property
    def answer(self) -> str:
        """The text outside of the thinking so far."""
        return "".join(self.answer_pieces)


Deltas = AsyncGenerator[tuple[Choice, OutputDelta] | None]
"""None once everything is queued, then deltas with the choices that they went to."""


class Generation:
    """Runs ``n`` samples of each prompt; choices are numbered prompt by prompt.

    Args:
        model: who generates.
        prompts: token ids of each prompt.
        sampling: for all of them.
        metrics: gets the timings at the end.
        kv: the KV plan that was asked for; None: the usual one.
        caller: who asked.

    Raises:
        InvalidField: prompts times ``n`` exceed the server's limit, the engine has no such plan, or heeds no deadline.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        metrics: ServerMetrics,
        kv: str | None = None,
        caller: Caller | None = None,
    ) -> None:
        most = model.limits.max_sequences_per_request
        if len(prompts) * sampling.n > most:
            asked = f"{len(prompts)} prompts with {sampling.n} samples each exceed {most} in one request"
            raise InvalidField("prompt", asked, "send several requests")
        try:
            check_thinking(sampling, model.llm.engine.thinking_marks)
        except ElbowroomError as reason:
            name, _, rest = reason.message.partition(" ")
            raise InvalidField(RENAMED.get(name, name), rest, reason.hint) from None
        try:
            model.llm.engine.parts.plans.number(kv)
        except ElbowroomError as reason:
            raise InvalidField("kv", reason.message.removeprefix("kv "), reason.hint) from None
        try:
            model.llm.engine.check_deadline(None if caller is None else caller.deadline_s)
        except ElbowroomError as reason:
            raise InvalidField("deadline_s", reason.message.removeprefix("deadline_s "), reason.hint) from None
        self.model, self.prompts, self.sampling, self._metrics = model, prompts, sampling, metrics
        self._kv, self._is_relieved, self._caller = kv, False, caller or Caller()
        self.choices = [Choice(index, index // sampling.n) for index in range(len(prompts) * sampling.n)]
        self._cached = [0] * len(prompts)
        self._started = time.perf_counter()

    async def deltas(self) -> Deltas:
        """Yield None once everything is queued, then every delta with the choice it went to; closing it aborts.

        Raises:
            RequestError: a prompt is malformed or can never fit; nothing is generated then.
            Overloaded: too many requests wait.
            QueueTimeout: it waited too long.
            TimedOut: it took too long.
            ElbowroomError: the engine failed.
        """
        tenant = self._metrics.tenant(self._caller.tenant.name)
        with tenant.refusals():
            opened = await self.model.open(self.prompts, self.sampling, self._kv, self._caller)
        with opened as stream:
            try:
                yield None
                async for prompt, delta, output in stream:
                    self._cached[prompt] = output.cached_tokens
                    self._is_relieved |= output.is_relieved
                    yield self._take(prompt, delta), delta
            finally:
                self._metrics.observe(self.model.name, self._started, self.choices)
                tenant.ended(sum(map(len, self.prompts)), self.choices)

    async def run(self) -> None:
        """Generate everything; errors as in ``deltas``."""
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass

    def take_whole(self, prompt: int, output: RequestOutput) -> None:
        """Take in the finished output of one prompt, which somebody else let generate."""
        self._cached[prompt] = output.cached_tokens
        self._is_relieved |= output.is_relieved
        for sample in output.outputs:
            choice = self.choices[prompt * self.sampling.n + sample.index]
            choice.pieces, choice.num_tokens = sample.pieces, len(sample.token_ids)
            choice.reasoning_pieces, choice.answer_pieces = sample.reasoning_pieces, sample.answer_pieces
            choice.num_reasoning_tokens = sample.num_reasoning_tokens
            choice.logprobs, choice.finish_reason = sample.logprobs or [], sample.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        generated = sum(choice.num_tokens for choice in self.choices)
        reasoning = None
        if self.model.llm.engine.thinking_marks is not None:
            reasoning = sum(choice.num_reasoning_tokens for choice in self.choices)
        return Usage.of(sum(map(len, self.prompts)), generated, sum(self._cached), self._is_relieved, reasoning)

    def _take(self, prompt: int, delta: OutputDelta) -> Choice:
        choice = self.choices[prompt * self.sampling.n + delta.index]
        if delta.token_ids:
            choice.last_s = time.perf_counter()
            choice.first_s = choice.first_s or choice.last_s
        if not choice.visible_s and delta.answer.strip():
            choice.visible_s = time.perf_counter()
        choice.pieces.append(delta.text)
        choice.reasoning_pieces.append(delta.reasoning)
        choice.answer_pieces.append(delta.answer)
        choice.num_reasoning_tokens = delta.num_reasoning_tokens
        choice.num_tokens += len(delta.token_ids)
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason
        return choice
