"""Models with random weights as Hugging Face directories: for measurements that need a size, not a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from elbowroom.core import LayerSpec
from elbowroom.kv.calibration import Calibration, Measurement, rounded
from elbowroom.models.hf_config import read_config
from elbowroom.models.loader import dummy_weights

SHAPES: dict[str, dict[str, int]] = {
    "20M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 8192,
        "max_position_embeddings": 8192,
    },
    "300M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "max_position_embeddings": 8192,
    },
    "336M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
        "max_position_embeddings": 40_960,
    },
}


def random_calibration(layers: Sequence[LayerSpec], seed: int = 0) -> Calibration:
    """Return a calibration in which all is drawn: a model with random weights has no heads that retrieve."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[float, ...]:
        return rounded(torch.rand(count, generator=generator).tolist())

    errors = [value * (spec.window is None) for value, spec in zip(drawn(len(layers)), layers, strict=True)]
    return Calibration(
        model="",
        measured=Measurement(
            contexts=0, runs=0, successes=0, longest_tokens=0, key_tokens=0, text="random", dtype="float32"
        ),
        layer_errors=tuple(value / sum(errors) for value in errors),
        head_scores=tuple(drawn(spec.num_q_heads) for spec in layers),
        copy_scores=tuple(drawn(spec.num_q_heads) for spec in layers),
        key_rms=tuple(tuple(drawn(spec.head_dim) for _ in range(spec.num_kv_heads)) for spec in layers),
    )


def write_random_model(directory: Path, size: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a Llama of about ``size`` parameters (a key of ``SHAPES``) without a tokenizer; return its directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **SHAPES[size],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = dummy_weights(read_config(directory), dtype, seed=seed).named_tensors()
    tensors = {name if name.startswith("lm_head") else f"model.{name}": each.data for name, each in weights.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
