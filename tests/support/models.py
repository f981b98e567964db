"""A tiny Llama directory written without transformers, for tests of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from elbowroom.models.hf_config import read_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


def write_config(directory: Path, **changes: Any) -> Path:
    """Write config.json with ``changes`` (``...`` removes a key) and return ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def random_tensors(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return weights for the config in ``directory``, named as Hugging Face does."""
    generator = torch.Generator().manual_seed(0)
    shapes = read_config(directory).tensor_shapes()
    return {
        name if name.startswith("lm_head") else f"model.{name}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def write_model(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a whole model and return its weights."""
    tensors = random_tensors(write_config(directory, **changes), dtype)
    save_file(tensors, directory / "model.safetensors")
    return tensors
