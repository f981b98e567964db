"""Tokens as text, for log-probabilities; and the two shapes in which the API writes them."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.engine.output import TokenLogprob
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.serve import responses
from elbowroom.serve.responses import LOWEST_LOGPROB, ChatLogprobs, CompletionLogprobs, TopLogprob


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text that a token adds inside a text; a part of a character gives U+FFFD."""
    # Some decoders drop the first token's leading space, so the token is read behind a copy of itself.
    once = tokenizer.decode([token_id], skip_special_tokens=False)
    return tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """Return the log-probabilities of a completion whose text so far has ``offset`` characters."""
    made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        text = token_text(tokenizer, entry.token_id)
        # Different tokens can have the same text; the most likely one is kept.
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(token_text(tokenizer, token_id), _finite(logprob))
        made.tokens.append(text)
        made.token_logprobs.append(_finite(entry.logprob))
        made.top_logprobs.append(top)
        made.text_offset.append(offset)
        offset += len(text)
    return made


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Return the log-probabilities of a message."""
    return ChatLogprobs(
        content=[
            responses.TokenLogprob(
                **_top(tokenizer, entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[_top(tokenizer, *each) for each in entry.top],
            )
            for entry in entries
        ]
    )


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    text = token_text(tokenizer, token_id)
    known = None if "\ufffd" in text else list(text.encode())
    return TopLogprob(token=text, bytes=known, logprob=_finite(logprob))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
