"""Prompts as users write them: text, token ids, or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elbowroom.errors import RequestError
from elbowroom.models.tokenizer import Tokenizer

Prompt = str | Mapping[str, Sequence[int]]
Message = Mapping[str, Any]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids of a string or of ``{"prompt_token_ids": [...]}``.

    Raises:
        RequestError: neither of the two.
        TokenizerError: text, and the model has no tokenizer.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if ids is None or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise RequestError(
            f"a prompt is text or a list of token ids, not {prompt!r:.80}", 'use {"prompt_token_ids": []}'
        )
    return list(ids)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation, ready for the assistant's answer.

    Raises:
        RequestError: a message is malformed.
        TokenizerError: the model has no tokenizer or no chat template.
    """
    # The template writes all special tokens itself.
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
