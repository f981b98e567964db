"""Export a training checkpoint as a plain Qwen2 folder: ``python -m recipes.builtin.export --run runs/builtin``.

Tied embeddings are untied (input ``sqrt(d) E``, output ``E``), so that any Qwen2 loader can read the model. Files
are written beside their place and renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes.builtin.model import (
    FFN_WIDTH,
    HEAD_DIM,
    HIDDEN,
    MAX_POSITIONS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    ROPE,
    VOCAB_SIZE,
    tied_config,
)

BUILT_IN = Path(__file__).resolve().parents[2] / "src" / "elbowroom" / "models" / "builtin"
PAD_ID, END_ID = 0, 4
"""Ids of <|pad|> and <|end|>."""


def hf_config(dtype: str) -> dict[str, object]:
    """Return ``config.json`` as transformers 4 and 5 read it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": FFN_WIDTH,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": NUM_Q_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE.theta},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def untie(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors by their names in Hugging Face files."""
    embedding = weights["embed_tokens.weight"]
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors["model.embed_tokens.weight"] = embedding * tied_config().embed_scale
    tensors["lm_head.weight"] = embedding
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def export(run: Path, folder: Path, dtype: str) -> None:
    """Write the checkpoint of ``run`` with its tokenizer to ``folder`` in ``dtype`` (e.g. "bfloat16")."""
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["weights"]
    staging = folder.with_name(folder.name + ".tmp")
    staging.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(untie(weights, getattr(torch, dtype)), staging / "model.safetensors", metadata={"format": "pt"})
    generation = {"do_sample": False, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    for name, content in (("config.json", hf_config(dtype)), ("generation_config.json", generation)):
        (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(run / name, staging / name)
    for path in staging.iterdir():
        path.rename(folder / path.name)
    staging.rmdir()


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/builtin"))
    parser.add_argument("--out", type=Path, default=BUILT_IN)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    export(arguments.run, arguments.out, arguments.dtype)


if __name__ == "__main__":
    main()
