"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from elbowroom.engine.output import OutputDelta, TokenLogprob
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.serve.body import parse_body, until_disconnect
from elbowroom.serve.call import Call
from elbowroom.serve.callers import caller_of
from elbowroom.serve.context import ServerContext
from elbowroom.serve.generation import Choice, Generation
from elbowroom.serve.openapi import answer_schema, body_schema
from elbowroom.serve.reply import head, respond, wants_usage
from elbowroom.serve.requests import CompletionRequest
from elbowroom.serve.responses import ChunkHead, Completion, CompletionChoice, CompletionLogprobs
from elbowroom.serve.sampling import check_ids, completion_sampling
from elbowroom.serve.token_text import completion_logprobs


class CompletionReply:
    """Writes completions.

    Args:
        generation: what is generated.
        with_logprobs: whether they were asked for.
        echoes: text before the completions of each prompt; empty for none.
        with_usage: whether chunks have a ``usage`` field (null but in the last one).
    """

    def __init__(
        self, generation: Generation, with_logprobs: bool, echoes: Sequence[str], with_usage: bool = False
    ) -> None:
        self._generation, self._tokenizer = generation, generation.model.llm.tokenizer
        self._with_logprobs, self._echoes = with_logprobs, echoes
        self._head = head("text_completion", "cmpl", generation.model.name)
        self._chunks = ChunkHead(self._head | ({"usage": None} if with_usage else {}))
        self._offsets = [0] * len(generation.choices)

    def full(self) -> Completion:
        """Return the whole answer."""
        choices = [
            CompletionChoice(
                index=choice.index,
                text=self._echo(choice) + choice.text,
                logprobs=self._logprobs(choice, choice.logprobs),
                finish_reason=choice.finish_reason,
            )
            for choice in self._generation.choices
        ]
        return Completion(**self._head, choices=choices, usage=self._generation.usage)

    def opening(self, choice: Choice) -> bytes | None:
        """Return the chunk that repeats the prompt, if that was asked for."""
        return self._one(choice, self._echo(choice), None, None) if self._echoes else None

    def chunk(self, choice: Choice, delta: OutputDelta) -> bytes | None:
        """Return the chunk for ``delta``."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._one(choice, delta.text, self._logprobs(choice, delta.logprobs), delta.finish_reason)

    def closing(self) -> Completion:
        """Return the chunk with the usage."""
        return Completion(**self._head, choices=[], usage=self._generation.usage)

    def _one(self, choice: Choice, text: str, logprobs: CompletionLogprobs | None, reason: str | None) -> bytes:
        piece = CompletionChoice(index=choice.index, text=text, logprobs=logprobs, finish_reason=reason)
        return self._chunks.chunk(piece)

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.prompt_index] if self._echoes else ""

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        made = completion_logprobs(self._tokenizer, entries, self._offsets[choice.index])
        self._offsets[choice.index] += sum(map(len, made.tokens))
        return made


def completions_router(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        openapi_extra=body_schema(CompletionRequest, context),
        responses=answer_schema(Completion, is_streamed=True),
        tags=["generate"],
    )
    async def create_completion(request: Request) -> Response:
        """Complete one prompt or several."""
        body = await parse_body(request, CompletionRequest, context.limits)
        caller = caller_of(request, body, context.limits)
        call = completion_call(context, body)
        prompts = await until_disconnect(request.receive, asyncio.to_thread(call.encode))
        generation = call.generation(context, prompts, caller)
        return await respond(request, body, generation, call.write(generation))

    return router


def completion_call(context: ServerContext, body: CompletionRequest) -> Call:
    """Return what a body asks for; errors as in ``chat_call``."""
    model = context.models.get(body.model)
    tokenizer = model.llm.tokenizer
    vocab_size = model.llm.engine.parts.config.vocab_size
    sampling = completion_sampling(body, tokenizer, vocab_size)

    def write(generation: Generation) -> CompletionReply:
        echoes = _echoes(tokenizer, body) if body.echo else []
        return CompletionReply(generation, body.logprobs is not None, echoes, wants_usage(body))

    return Call(body, model, sampling, lambda: _prompt_ids(tokenizer, body, vocab_size), write)


def _prompt_ids(tokenizer: Tokenizer, body: CompletionRequest, vocab_size: int) -> list[list[int]]:
    for each in body.prompts:
        if not isinstance(each, str):
            check_ids("prompt", each, tokenizer, vocab_size)
    return [tokenizer.encode(each) if isinstance(each, str) else each for each in body.prompts]


def _echoes(tokenizer: Tokenizer, body: CompletionRequest) -> list[str]:
    return [each if isinstance(each, str) else tokenizer.decode(each) for each in body.prompts]
