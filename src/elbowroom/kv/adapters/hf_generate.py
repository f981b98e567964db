"""generate() of a transformers model, which tells a cache where the prompt ends."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

_NAME = "generate"


@runtime_checkable
class ReadsPrompts(Protocol):
    """A cache that wants to know where prompts end."""

    def get_seq_length(self) -> int:
        """Return the cached columns."""

    def generating(self, until: int) -> AbstractContextManager[None]:
        """Let the prompt end at column ``until`` while generate runs."""


def watch_generate(model: Any) -> Any:
    """Let ``model.generate`` tell its cache how long the prompt is, which may be read in several calls.

    Returns:
        what ``unwatch_generate`` needs: the generate of this one model, if it had one.
    """
    own: Any = vars(model).get(_NAME)
    inherited: Any = getattr(type(model), _NAME, own)
    if inherited is None:
        return None
    signature = inspect.signature(model.generate)

    @functools.wraps(inherited)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(inherited, self) if own is None else own
        given = signature.bind(*args, **kwargs).arguments | kwargs
        cache = given.get("past_key_values")
        if not isinstance(cache, ReadsPrompts):
            return call(*args, **kwargs)
        with cache.generating(_prompt_columns(given, cache.get_seq_length())):
            return call(*args, **kwargs)

    model.generate = types.MethodType(generate, model)  # copies and pickles of the model do the right thing
    return own


def unwatch_generate(model: Any, own: Any) -> None:
    """Give ``model`` back the generate that it had; ``own`` is what ``watch_generate`` returned."""
    vars(model).pop(_NAME, None)
    if own is not None:
        model.generate = own


def _prompt_columns(given: Mapping[str, Any], num_cached: int) -> int:
    """Return the columns behind the prompt.

    Args:
        given: arguments of generate.
        num_cached: columns before it. Input may hold them too: then it is as long as the mask, which always does.
    """
    embedded, mask = given.get("inputs_embeds"), given.get("attention_mask")
    tokens = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    if embedded is not None:
        return int(embedded.shape[1])
    count = 1 if tokens is None else int(tokens.shape[1])
    return count if mask is None or mask.shape[1] == count else num_cached + count
