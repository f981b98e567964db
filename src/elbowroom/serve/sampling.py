"""From the fields of a request to SamplingParams; refuses what is understood but not built."""

from __future__ import annotations

from collections.abc import Collection

from elbowroom.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from elbowroom.errors import RequestError
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.serve.errors import InvalidField
from elbowroom.serve.requests import RENAMED, ChatRequest, CompletionRequest, GenerationRequest

_MOST_TOKENS = 2**31
_PASSED_ON = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed",
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "answer_reserve",
)  # fmt: skip


def completion_sampling(body: CompletionRequest, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """Return the sampling of a completion.

    Raises:
        RequestError: a field is out of range, or asks for something that is not built.
    """
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidField("best_of", "ranking more samples than are returned is not supported", "leave it out, use n")
    if body.suffix:
        raise InvalidField("suffix", "inserting text before a suffix is not supported", "leave it out")
    if body.echo and body.logprobs is not None:
        raise InvalidField("echo", "log-probabilities of the prompt are not supported", "set only one of the two")
    return _sampling(body, tokenizer, vocab_size, body.max_tokens, body.logprobs)


def chat_sampling(body: ChatRequest, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """Return the sampling of a chat; errors as in ``completion_sampling``."""
    if body.tools or body.functions or body.tool_choice not in (None, "none", "auto"):
        raise InvalidField("tools", "calling tools is not supported", "describe them in the messages instead")
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidField("response_format", f"{body.response_format.type!r} is not supported", 'use {"type": "text"}')
    if body.modalities not in (None, [], ["text"]):
        raise InvalidField("modalities", "only text is supported", 'use ["text"]')
    if body.max_completion_tokens is not None:
        _check_limit("max_completion_tokens", body.max_completion_tokens)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _sampling(body, tokenizer, vocab_size, limit, _chat_logprobs(body))


def check_ids(param: str, ids: Collection[int], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check the token ids in a field.

    Raises:
        InvalidField: the model has no such token.
    """
    try:
        tokenizer.check_ids(list(ids), vocab_size)
    except RequestError as reason:
        raise InvalidField(param, reason.message, reason.hint) from None


def _chat_logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise InvalidField("top_logprobs", "is only allowed together with logprobs", "set logprobs to true")
        return None
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidField("top_logprobs", f"must be from 0 to {MAX_TOP_LOGPROBS}, not {body.top_logprobs}")
    return body.top_logprobs or 0


def _sampling(
    body: GenerationRequest, tokenizer: Tokenizer, vocab_size: int, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    if max_tokens is not None:
        _check_limit("max_tokens", max_tokens)
    if body.stream_options is not None and not body.stream:
        raise InvalidField("stream_options", "is only allowed together with stream", "set stream to true")
    bias = _logit_bias(body.logit_bias or {})
    check_ids("logit_bias", bias, tokenizer, vocab_size)
    check_ids("stop_token_ids", body.stop_token_ids or (), tokenizer, vocab_size)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given = {name: value for name in _PASSED_ON if (value := getattr(body, name)) is not None}
    given |= {name: value for name, field in RENAMED.items() if (value := getattr(body, field)) is not None}
    try:
        return SamplingParams(
            **given,
            max_tokens=None if max_tokens is None else min(max_tokens, _MOST_TOKENS),
            logit_bias=bias,
            stop=tuple(stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=logprobs,
        )
    except RequestError as reason:
        # Its messages begin with the name of the field.
        name, _, rest = reason.message.partition(" ")
        name = RENAMED.get(name, name)
        if name in type(body).model_fields:
            raise InvalidField(name, rest, reason.hint) from None
        raise


def _check_limit(param: str, max_tokens: int) -> None:
    if max_tokens < 1:
        raise InvalidField(param, f"must be at least 1, not {max_tokens}")


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdecimal() and len(key) < 20 for key in given):
        raise InvalidField("logit_bias", "its keys must be token ids, written as text")
    return {int(key): bias for key, bias in given.items()}
