"""The table of supported families: what differs between their config.json files and layers.

A further family of plain decoders is one more entry here. Defaults are those that transformers gives to omitted keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Windows = Literal["none", "all", "late", "pattern"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one ``model_type`` is read; everything not listed here is the same for all."""

    architecture: str
    """Entry of ``architectures`` in config.json."""
    defaults: Mapping[str, object]
    """Values of omitted keys."""
    qkv_bias: bool | None = False
    """Biases on the q, k and v projections; None means that ``attention_bias`` decides."""
    o_bias: bool | None = False
    """Bias on the output projection; None means that ``attention_bias`` decides."""
    has_mlp_bias: bool = False
    """Whether ``mlp_bias`` is read."""
    windows: Windows = "none"
    """Which layers slide: none, all, the ones from ``max_window_layers`` on, or by ``sliding_window_pattern``."""
    activation_key: str = "hidden_act"
    qk_norm: bool = False
    local_rope: bool = False
    """Sliding layers have a RoPE of their own, never scaled (Gemma 3)."""
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embeddings: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    has_softcaps: bool = False
    """Whether ``attn_logit_softcapping`` and ``final_logit_softcapping`` are read."""
    has_query_scalar: bool = False
    """Whether scores are scaled by ``query_pre_attn_scalar`` rather than by the head width."""


_COMMON: dict[str, object] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}
_LLAMA = _COMMON | {
    "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_QWEN2 = _COMMON | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA3 = _COMMON | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", defaults=_LLAMA, qkv_bias=None, o_bias=None, has_mlp_bias=True),
    "mistral": Family(architecture="MistralForCausalLM", defaults=_MISTRAL, windows="all"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", defaults=_QWEN2, qkv_bias=True, windows="late"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN2 | {"head_dim": 128},
        qkv_bias=None,
        o_bias=None,
        windows="late",
        qk_norm=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=_GEMMA3,
        qkv_bias=None,
        o_bias=None,
        windows="pattern",
        activation_key="hidden_activation",
        qk_norm=True,
        local_rope=True,
        norm_offset=1.0,
        post_norms=True,
        scaled_embeddings=True,
        has_softcaps=True,
        has_query_scalar=True,
    ),
}
"""Supported families by ``model_type``."""
