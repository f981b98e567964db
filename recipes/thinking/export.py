"""Export the thinking model as a plain Qwen2 folder: ``python -m recipes.thinking.export --run runs/thinking``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from elbowroom.models.directory import THINKING
from recipes.thinking.model import (
    FFN_WIDTH,
    HEAD_DIM,
    HIDDEN,
    MAX_POSITIONS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_Q_HEADS,
    ROPE,
    config,
)
from recipes.thinking.tokenizer import END_ID, PAD_ID, VOCAB_SIZE, save_tokenizer


def hf_config() -> dict[str, object]:
    """Return ``config.json`` as transformers 4 and 5 read it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN_WIDTH,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": NUM_Q_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE.theta},
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def export(run: Path, folder: Path) -> None:
    """Write the checkpoint of ``run`` with untied embeddings, its tokenizer and its settings to ``folder``."""
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["weights"]
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    tensors["lm_head.weight"] = weights["embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = weights["embed_tokens.weight"] * config().embed_scale
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_tokenizer(folder, MAX_POSITIONS)
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"do_sample": False, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    for name, content in (("config.json", hf_config()), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/thinking"))
    parser.add_argument("--out", type=Path, default=THINKING)
    arguments = parser.parse_args()
    export(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
