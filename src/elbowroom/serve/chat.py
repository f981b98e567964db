"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from elbowroom.engine.output import OutputDelta, TokenLogprob
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.serve.body import parse_body, until_disconnect
from elbowroom.serve.call import Call
from elbowroom.serve.callers import caller_of
from elbowroom.serve.context import ServerContext
from elbowroom.serve.errors import InvalidField
from elbowroom.serve.generation import Choice, Generation
from elbowroom.serve.openapi import answer_schema, body_schema
from elbowroom.serve.reply import head, respond, wants_usage
from elbowroom.serve.requests import ChatMessage, ChatRequest
from elbowroom.serve.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChunkHead,
    Message,
)
from elbowroom.serve.sampling import chat_sampling
from elbowroom.serve.token_text import chat_logprobs

_RESERVED = frozenset({"self", "messages", "tools"})


class ChatReply:
    """Writes answers of a chat.

    Args:
        generation: what is generated.
        with_logprobs: whether they were asked for.
        with_usage: whether chunks have a ``usage`` field (null but in the last one).
    """

    def __init__(self, generation: Generation, with_logprobs: bool, with_usage: bool = False) -> None:
        self._generation, self._tokenizer = generation, generation.model.llm.tokenizer
        self._with_logprobs = with_logprobs
        self._head = head("chat.completion", "chatcmpl", generation.model.name)
        self._chunk_head = self._head | {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})
        self._chunks = ChunkHead(self._chunk_head)

    def full(self) -> ChatCompletion:
        """Return the whole answer."""
        choices = [
            ChatChoice(
                index=choice.index,
                message=_message(choice),
                logprobs=self._logprobs(choice.logprobs),
                finish_reason=choice.finish_reason,
            )
            for choice in self._generation.choices
        ]
        return ChatCompletion(**self._head, choices=choices, usage=self._generation.usage)

    def opening(self, choice: Choice) -> bytes:
        """Return the chunk that names the role."""
        return self._one(choice, Message(role="assistant", content=""), None, None)

    def chunk(self, choice: Choice, delta: OutputDelta) -> bytes | None:
        """Return the chunk for ``delta``."""
        piece = Message()
        if delta.reasoning:
            piece.reasoning_content = delta.reasoning
        if delta.answer:
            piece.content = delta.answer
        if not (piece.model_fields_set or delta.logprobs or delta.finish_reason):
            return None  # a mark of thinking, or the beginning of one
        return self._one(choice, piece, self._logprobs(delta.logprobs), delta.finish_reason)

    def closing(self) -> ChatChunk:
        """Return the chunk with the usage."""
        return ChatChunk(**self._chunk_head | {"usage": self._generation.usage}, choices=[])

    def _one(self, choice: Choice, piece: Message, logprobs: ChatLogprobs | None, reason: str | None) -> bytes:
        made = ChatChunkChoice(index=choice.index, delta=piece, logprobs=logprobs, finish_reason=reason)
        return self._chunks.chunk(made)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, entries) if self._with_logprobs else None


def _message(choice: Choice) -> Message:
    made = Message(role="assistant", content=choice.answer, refusal=None)
    if choice.reasoning:
        made.reasoning_content = choice.reasoning
    return made


def chat_router(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        openapi_extra=body_schema(ChatRequest, context),
        responses=answer_schema(ChatCompletion, is_streamed=True),
        tags=["generate"],
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        body = await parse_body(request, ChatRequest, context.limits)
        caller = caller_of(request, body, context.limits)
        call = chat_call(context, body)
        prompts = await until_disconnect(request.receive, asyncio.to_thread(call.encode))
        generation = call.generation(context, prompts, caller)
        return await respond(request, body, generation, call.write(generation))

    return router


def chat_call(context: ServerContext, body: ChatRequest) -> Call:
    """Return what a body asks for.

    Raises:
        RequestError: a field is out of range, or asks for something that is not built or not served.
    """
    model = context.models.get(body.model)
    tokenizer = model.llm.tokenizer
    sampling = chat_sampling(body, tokenizer, model.llm.engine.parts.config.vocab_size)

    def write(generation: Generation) -> ChatReply:
        return ChatReply(generation, bool(body.logprobs), wants_usage(body))

    return Call(body, model, sampling, lambda: [_prompt_ids(tokenizer, body)], write)


def _prompt_ids(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    variables = body.chat_template_kwargs or {}
    if not _RESERVED.isdisjoint(variables):
        raise InvalidField("chat_template_kwargs", f"must not contain {', '.join(sorted(_RESERVED))}")
    messages = [_plain(index, message) for index, message in enumerate(body.messages)]
    # The template writes all special tokens itself.
    return tokenizer.encode(tokenizer.apply_chat_template(messages, **variables), add_special_tokens=False)


def _plain(index: int, message: ChatMessage) -> dict[str, Any]:
    """Return a message as templates expect it: content is text, and "developer" is the new name of "system"."""
    made: dict[str, Any] = dict(message.model_extra or {})
    role = "system" if message.role == "developer" else message.role
    return made | {"role": role, "content": _text(index, message)}


def _text(index: int, message: ChatMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidField(f"messages.{index}.content", f"a part of type {part.type!r} cannot be read", "send text")
    return "\n".join(part.text or "" for part in message.content)
