"""What clients may send. Types are strict, null means "default", unknown fields are ignored as OpenAI does.

Fields that are understood but not built are declared too, so that asking for them is refused and not overlooked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Prompts = list[str] | list[list[int]]
RENAMED = {"thinking_budget": "thinking_token_budget"}
"""Sampling parameters that have another name here: the one that clients know from vLLM."""


class Schema(BaseModel):
    """Base: strict types, finite numbers, unknown fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())


class StreamOptions(Schema):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class GenerationRequest(Schema):
    """What both routes have in common; the second group are extensions that other engines know too."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    """Lower runs first; only where the server allows it."""
    deadline_s: float | None = None
    """Seconds in which the first token is due; where the server allows priorities and serves by deadline."""
    admission: str | None = None
    """Name of the admission policy that lets it begin; only where the server allows it."""
    kv: str | None = None
    """One of the KV plans that the server was started with."""
    thinking_token_budget: int | None = None
    """Most tokens of thinking; then its end is forced."""
    answer_reserve: int | None = None
    """Of the most tokens, those kept for the answer."""


def _as_list(prompt: Any) -> Any:
    """Turn one prompt (text or token ids) into a list of one; refuse what is no prompt."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")
    if any(item in ("", []) for item in prompt):
        raise ValueError("must not be empty")
    are_texts = all(isinstance(item, str) for item in prompt)
    if not are_texts and not all(isinstance(item, list) and _is_ids(item) for item in prompt):
        raise ValueError("must hold only texts, or only lists of token ids")
    return prompt


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT: dict[str, Any] = {
    "anyOf": [_TEXT, _IDS, *({"type": "array", "minItems": 1, "items": each} for each in (_TEXT, _IDS))]
}


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_as_list), WithJsonSchema(_PROMPT)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> Prompts:
        """All prompts, as texts or as token ids."""
        made: Prompts = self.prompt
        return made


class ContentPart(Schema):
    """One part of a message; only text can be read, and another type has an error that names it."""

    model_config = ConfigDict(json_schema_extra={"required": ["type", "text"]})

    type: Annotated[str, WithJsonSchema({"const": "text"})]
    text: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class ChatMessage(Schema):
    """One message of a conversation; further fields (tool_calls, name) go to the model's template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class ResponseFormat(Schema):
    """The asked-for format of the answer."""

    type: str


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's template, such as ``enable_thinking`` (an extension)."""
