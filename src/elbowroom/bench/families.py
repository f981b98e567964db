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
    config_class, keys = FAMILIES[name]
    model = random_transformers_model(config_class, {**_SHAPE, **keys}, seed, gain=4.0)
    model.save_pretrained(directory)
    model.generation_config.eos_token_id = None
    return model


def random_transformers_model(config_class: str, config: dict[str, Any], seed: int, gain: float) -> Any:
    """Return a transformers model in float32 whose random weights exercise every switch of its family.

    Args:
        config_class: name of the configuration class in transformers.
        config: its arguments.
        seed: of the weights.
        gain: factor on the matrices, so that logits spread.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    made = getattr(transformers, config_class)(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start neutral; make them count
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name:
                parameter.mul_(gain)
    return model
