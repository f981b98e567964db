"""What a transformers config says of its attention layers, or why it cannot be right here."""

from __future__ import annotations

from typing import Any

from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError

_HINT = "generate without past_key_values: this model keeps its own cache"
_WINDOWED = {"full_attention": False, "sliding_attention": True}
_REFUSED = {
    "is_encoder_decoder": "an encoder beside its decoder",
    "kv_lora_rank": "keys and values compressed to a latent vector (MLA)",
    "num_kv_shared_layers": "layers that read the keys of other layers",
    "kv_sharing_modes": "layers that read the keys of other layers",
    "use_bidirectional_attention": "attention to later tokens",
    "index_topk": "attention to tokens that an indexer chooses",
    "alibi": "scores that depend on distance (ALiBi)",
}
"""Keys of configurations that, where they are set, ask for attention that the store does not have."""


def layer_specs(config: Any) -> list[LayerSpec]:
    """Return the attention layers of a decoder.

    Args:
        config: the model's configuration as transformers has it.

    Raises:
        PlanError: it names attention that the store does not compute.
    """
    text = config.get_text_config(decoder=True)
    for key, meaning in _REFUSED.items():
        if getattr(config, key, None) or getattr(text, key, None):
            raise PlanError(f"a {text.model_type} model has {meaning} ({key}), which no KV plan keeps", _HINT)
    if getattr(text, "is_causal", True) is False:
        raise PlanError(
            f"this {text.model_type} model attends to later tokens (is_causal), which needs no cache", _HINT
        )
    types = getattr(text, "layer_types", None)
    return [
        _layer_spec(each, types[index] if types else None, index)
        for index, each in enumerate(text.per_layer_config)  # one for all, unless layers differ
    ]


def _layer_spec(config: Any, layer_type: str | None, index: int) -> LayerSpec:
    window = getattr(config, "sliding_window", None)
    if layer_type is not None and layer_type not in _WINDOWED:
        raise PlanError(
            f"layer {index} of this {config.model_type} model is {layer_type!r}, which no plan keeps", _HINT
        )
    if layer_type is not None and not _WINDOWED[layer_type]:
        window = None
    num_q_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_q_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_q_heads
    if num_q_heads % num_kv_heads:
        raise PlanError(f"layer {index}: {num_q_heads} query heads cannot share {num_kv_heads} KV heads", _HINT)
    return LayerSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=getattr(config, "v_head_dim", None) or head_dim,
        scale=_scale(config, head_dim),
        rope=None,  # keys come rotated
        window=window,
        softcap=getattr(config, "attn_logit_softcapping", None),
    )


def _scale(config: Any, head_dim: int) -> float:
    """Return the factor on q.k; every call of attention is checked against it."""
    multiplier = getattr(config, "attention_multiplier", None)
    if multiplier is not None:
        return float(multiplier)
    return float((getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5)
