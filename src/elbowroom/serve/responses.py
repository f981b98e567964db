"""What the server sends, as the OpenAI API defines it. Written with ``exclude_unset``: what is not set is not sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class Schema(BaseModel):
    """Base of all responses."""

    model_config = ConfigDict(protected_namespaces=())

    def json_bytes(self) -> bytes:
        """Return the JSON of all fields that were set."""
        return self.model_dump_json(exclude_unset=True).encode()


class ChunkHead:
    """What all chunks of a stream begin with, written once.

    Args:
        fields: those of ``Answer`` that every chunk has.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._begin = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()[:-1] + b',"choices":['

    def chunk(self, choice: Schema) -> bytes:
        """Return the JSON of the chunk that holds one piece of a choice."""
        return self._begin + choice.json_bytes() + b"]}"


class PromptTokensDetails(Schema):
    """Where prompt tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Schema):
    """What completion tokens were spent on."""

    reasoning_tokens: int


class Usage(Schema):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    """For models that think."""
    kv_relieved: bool | None = None
    """True if memory was so short that tokens went over to the server's relief plan (an extension)."""

    @classmethod
    def of(
        cls,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        kv_relieved: bool = False,
        reasoning_tokens: int | None = None,
    ) -> Usage:
        """Return the usage with its sums."""
        usage = cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )
        if kv_relieved:
            usage.kv_relieved = True
        if reasoning_tokens is not None:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
        return usage


class Answer(Schema):
    """What every answer and every chunk begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None


class CompletionLogprobs(Schema):
    """Log-probabilities of a completion, one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Schema):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Answer):
    """Answer, or chunk, of /v1/completions."""

    choices: list[CompletionChoice]


class TopLogprob(Schema):
    """A likely token."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """The chosen token and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Schema):
    """Log-probabilities of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class Message(Schema):
    """A message, or a piece of it; ``role`` comes with the first piece only."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    """What was thought before, where the model does (an extension that DeepSeek's API and others know)."""
    refusal: str | None = None


class ChatChoice(Schema):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions."""

    choices: list[ChatChoice]


class ChatChunkChoice(Schema):
    """A piece of one answer."""

    index: int
    delta: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(Answer):
    """Chunk of a streamed /v1/chat/completions."""

    choices: list[ChatChunkChoice]


class ModelCard(Schema):
    """A served model; ``max_model_len`` is the context in tokens (an extension)."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Schema):
    """Answer of /v1/models."""

    object: str
    data: list[ModelCard]
