"""The attention function "elbowroom" of transformers: over a store where keys came through one, else SDPA."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from elbowroom.errors import PlanError
from elbowroom.kv.adapters.hf_generate import unwatch_generate, watch_generate
from elbowroom.kv.adapters.hf_mask import PaddingMask, padding_mask, read_mask, request_of

NAME = "elbowroom"
_ATTRIBUTE = "elbowroom_layer"


class AttendsByStore(Protocol):
    """A layer of a cache that does the attention too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: PaddingMask, options: dict[str, Any]) -> Tensor:
        """Store ``k, v [B, Hkv, T, D]`` and return attention ``[B, T, Hq, Dv]`` of ``q [B, Hq, T, D]``."""


def mark(keys: Tensor, layer: AttendsByStore) -> None:
    """Note on new keys which layer their attention belongs to: the attention function gets the same object."""
    setattr(keys, _ATTRIBUTE, layer)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention ``[B, T, Hq, Dv]`` and no weights, as transformers calls it."""
    layer: AttendsByStore | None = getattr(key, _ATTRIBUTE, None)
    if layer is not None:
        return layer.attend(query, key, value, read_mask(attention_mask), options), None
    request = request_of(attention_mask)
    mask = attention_mask if request is None else request.dense(sdpa_mask)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@dataclass(slots=True)
class _Switched:
    """A model whose attention is ours, and what it had before."""

    before: dict[str, str]
    generate: Any = None
    """Its own one, if it had one beside that of its class."""
    num_users: int = 0


_SWITCHED: weakref.WeakKeyDictionary[nn.Module, _Switched] = weakref.WeakKeyDictionary()


def switch_on(model: Any) -> None:
    """Give ``model`` this attention, and watch its prompts; each call needs one of ``switch_off``.

    Raises:
        PlanError: the model does not take it.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    switched = _SWITCHED.get(model)
    if switched is None:
        switched = _SWITCHED[model] = _Switched(_implementations(model.config))
    model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:  # noqa: SLF001
        raise PlanError(
            f"{type(model).__name__} does not let its attention be chosen",
            "generate without past_key_values: this model keeps its own cache",
        )
    if switched.num_users == 0:
        switched.generate = watch_generate(model)
    switched.num_users += 1


def switch_off(model: Any) -> None:
    """Give back the attention that ``model`` had, unless another cache still needs this one."""
    switched = _SWITCHED[model]
    switched.num_users -= 1
    if switched.num_users == 0:
        del _SWITCHED[model]
        unwatch_generate(model, switched.generate)
        model.set_attn_implementation(switched.before)


def _implementations(config: Any) -> dict[str, str]:
    """Return the attention of a model and of its parts, in the form that ``set_attn_implementation`` reads."""
    parts = {"": config} | {key: getattr(config, key) for key in config.sub_configs}
    found = {key: getattr(part, "_attn_implementation", None) for key, part in parts.items()}
    return {key: value for key, value in found.items() if value is not None}
