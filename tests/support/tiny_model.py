"""A random model of a few hundred kilobytes as a Hugging Face directory, with tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|end|>", "<|start|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def write_tiny_model(directory: Path, *, family: str = "qwen2", seed: int = 0, context: int = 512) -> Path:
    """Write a byte-level Qwen2 or Llama model with random weights and return its directory.

    Every byte is one token; ``<|end|>`` (256) ends a text. The model writes printable ASCII almost only, and its
    greedy texts vary. transformers can load it too.
    """
    assert family in ("qwen2", "llama")
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(family, seed), directory / "model.safetensors", metadata={"format": "pt"})
    write_byte_tokenizer(directory)
    return directory


def write_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token for each byte (id = byte) and a chat template."""
    vocab = {text: byte for byte, text in enumerate(_byte_texts())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))


def _byte_texts() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE (GPT-2's table)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _weights(family: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    head = 4.0 * torch.randn(VOCAB_SIZE, HIDDEN, generator=generator) / HIDDEN**0.5
    printable = torch.zeros(VOCAB_SIZE, 1)
    printable[0x20:0x7F] = 1.0
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB_SIZE, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head * printable,
    }
    head_dim = HIDDEN // HEADS
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = torch.ones(HIDDEN)
        weights[f"{at}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = 2.0 * normal(heads * head_dim, HIDDEN)
            if family == "qwen2":
                weights[f"{at}.self_attn.{name}_proj.bias"] = torch.zeros(heads * head_dim)
        weights[f"{at}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * head_dim)
        weights[f"{at}.mlp.gate_proj.weight"] = 2.0 * normal(INTERMEDIATE, HIDDEN)
        weights[f"{at}.mlp.up_proj.weight"] = normal(INTERMEDIATE, HIDDEN)
        weights[f"{at}.mlp.down_proj.weight"] = 2.0 * normal(HIDDEN, INTERMEDIATE)
    return weights
