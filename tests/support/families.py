"""Tiny random models of every family, written to disk by transformers: the reference for parity tests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elbowroom.bench.families import random_transformers_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One tiny model: a family's configuration class of transformers and the keys that make the case."""

    name: str
    config_class: str
    keys: dict[str, Any] = field(default_factory=dict)
    attention_softcap: float | None = None

    def build(self, seed: int = 0) -> Any:
        """Return the transformers model in float32 with weights that exercise every switch."""
        return random_transformers_model(self.config_class, {**_SHAPE, **self.keys}, seed, gain=6.0)


CASES = [
    Case("llama", "LlamaConfig"),
    Case("llama-tied-mha", "LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case("llama-biases-wide-heads", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    Case("llama-llama3", "LlamaConfig", {"rope_parameters": LLAMA3}),
    Case("llama-linear", "LlamaConfig", {"rope_parameters": LINEAR}),
    Case("llama-yarn", "LlamaConfig", {"rope_parameters": YARN}),
    Case(
        "llama-yarn-mscale",
        "LlamaConfig",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}},
    ),
    Case("mistral-window", "MistralConfig", {"sliding_window": 32}),
    Case("mistral-full", "MistralConfig", {"sliding_window": None, "head_dim": 40}),
    Case("qwen2", "Qwen2Config"),
    Case("qwen2-yarn-tied", "Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    Case(
        "qwen2-late-windows",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    ),
    Case("qwen3", "Qwen3Config", {"head_dim": 32}),
    Case("qwen3-biases-tied", "Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    Case("qwen3-yarn", "Qwen3Config", {"head_dim": 32, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    Case(
        "qwen3-late-windows",
        "Qwen3Config",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    Case(
        "gemma3-windows",
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 32, "sliding_window_pattern": 2},
    ),
    Case(
        "gemma3-linear-untied-softcaps",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        attention_softcap=2.0,
    ),
]
"""Every family and every kind of RoPE."""


def as_version_4(path: Path, *, type_key: str) -> None:
    """Rewrite a config.json of transformers 5 in the keys of version 4; ``type_key`` is ``type`` or ``rope_type``."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype", None)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    if "_sliding_window_pattern" in config:
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    config.pop("layer_types", None)  # version 4 derived them from the other keys
    path.write_text(json.dumps(config))
