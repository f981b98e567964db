"""Random models of every family, written by transformers: the rival that ``parity`` compares with."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 96}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 96, "sliding_window_pattern": 2}),
}


def write_family(name: str, directory: Path, seed: int = 0) -> Any:
    """Write a random model of family ``name`` and return it as transformers has it, in float32.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    config_class, keys = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**_SHAPE, **keys})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start neutral; make them count
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in parameter_name:
                parameter.mul_(4.0)
    model.save_pretrained(directory)
    model.generation_config.eos_token_id = None
    return model
