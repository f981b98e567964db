"""Models with random weights as Hugging Face directories: for measurements that need a size, not a text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from elbowroom.models.hf_config import read_config
from elbowroom.models.loader import dummy_weights

SHAPES: dict[str, dict[str, int]] = {
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "300M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
}
_VOCABULARY = {"20M": 8192, "300M": 32_000}


def write_random_model(directory: Path, size: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a Llama of about ``size`` parameters (20M, 300M) without a tokenizer and return its directory."""
    shape = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY[size],
        "num_key_value_heads": shape["num_attention_heads"] // 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **shape,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = dummy_weights(read_config(directory), dtype, seed=seed).named_tensors()
    tensors = {name if name.startswith("lm_head") else f"model.{name}": each.data for name, each in weights.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
