"""The mask function of transformers models whose cache is a KV store: which columns of a batch are tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elbowroom.errors import PlanError

_ATTRIBUTE = "elbowroom_mask"


@dataclass(frozen=True, slots=True)
class PaddingMask:
    """What a model asked its mask function for, in place of the scores' mask."""

    is_token: Tensor
    """bool ``[B, columns]``, cached columns included."""
    window: int | None
    """Sliding window of the layers that this mask is for."""
    is_causal: bool
    """Nothing but the order of tokens, the window and padding decides who reads whom."""
    arguments: dict[str, Any]
    """All of the request, for attention that needs the mask itself."""

    def dense(self, make: Callable[..., Tensor | None]) -> Tensor | None:
        """Return the mask that ``make``, a mask function of transformers, builds from the same request."""
        return make(**self.arguments)


def padding_mask(**arguments: Any) -> Tensor:
    """Return the 2-D padding mask, bool ``[B, columns]``, which carries a PaddingMask.

    Args:
        arguments: those of transformers' mask functions: sizes, ``attention_mask`` (bool ``[B, columns]`` or None),
            ``local_size`` (a window), and what tells a causal mask from others.
    """
    given, rows, columns = arguments.get("attention_mask"), arguments["batch_size"], arguments["kv_length"]
    if given is None:
        is_token = torch.ones(rows, columns, dtype=torch.bool)
    else:
        is_token = given.to("cpu", torch.bool)
        if is_token is given:
            is_token = given.view_as(given)  # an object of its own: the caller's carries nothing
    # Masks that are more than causal may not be skipped, or come from functions of the model's own.
    is_causal = bool(arguments.get("allow_is_causal_skip", True)) and not arguments.get("use_vmap", False)
    request = PaddingMask(is_token, arguments.get("local_size"), is_causal, arguments)
    setattr(is_token, _ATTRIBUTE, request)
    return is_token


def request_of(mask: Tensor | None) -> PaddingMask | None:
    """Return what ``padding_mask`` put on ``mask``, if it did."""
    request = getattr(mask, _ATTRIBUTE, None)
    assert request is None or isinstance(request, PaddingMask)
    return request


def read_mask(mask: Tensor | None) -> PaddingMask:
    """Return what the mask says.

    Raises:
        PlanError: it is not a mask that ``padding_mask`` made, so that nobody knows what is padding.
    """
    request = request_of(mask)
    if request is None:
        found = "no mask" if mask is None else f"a mask of shape {list(mask.shape)}"
        raise PlanError(
            f"attention got {found} that says nothing of padding",
            "give the model an attention_mask of two dimensions, or none; 4-D masks cannot be kept by a KV plan",
        )
    return request
