"""Shape and initial weights of the thinking model: a Qwen2 of half a million weights with tied embeddings.

As in the built-in model, layer 0 starts with previous-token heads: to look up the digit behind a letter is induction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, RopeSpec
from elbowroom.kernels.rope import inverse_frequencies
from elbowroom.models.config import ModelConfig
from recipes.thinking.tokenizer import VOCAB_SIZE

HIDDEN, FFN_WIDTH, NUM_LAYERS, MAX_POSITIONS = 96, 256, 4, 1024
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 32
ROPE = RopeSpec(theta=10_000.0)
NUM_BUILT_IN = 6
"""Rotary pairs that carry a built-in previous-token head."""
BUILT_IN_STRENGTH = 6.0
OFFSETS = (1, 2, 3, 4)
"""Distance in tokens that each query head of layer 0 reads at the start of training."""


def config() -> ModelConfig:
    """Return the shape in training: tied embeddings whose input side is scaled by sqrt(hidden size)."""
    layer = LayerSpec(
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        rope=ROPE,
    )
    return ModelConfig(
        family="qwen2",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=FFN_WIDTH,
        layers=(layer,) * NUM_LAYERS,
        max_positions=MAX_POSITIONS,
        norm_eps=1e-6,
        qkv_bias=True,
        embed_scale=HIDDEN**0.5,
        tie_embeddings=True,
    )


def initial_tensors(seed: int) -> dict[str, Tensor]:
    """Return random float32 weights with built-in previous-token heads in layer 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config().tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape) if "norm" in name else torch.zeros(shape)
            continue
        std = shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= (2 * NUM_LAYERS) ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * std
    _build_previous_token_heads(tensors)
    return tensors


def _build_previous_token_heads(tensors: dict[str, Tensor]) -> None:
    pairs, strength, half = NUM_BUILT_IN, BUILT_IN_STRENGTH, HEAD_DIM // 2
    frequency = inverse_frequencies(ROPE, HEAD_DIM)[0][:pairs]
    query, key = "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"
    for head, offset in enumerate(OFFSETS):
        start = head * HEAD_DIM
        tensors[f"{query}.bias"][start : start + pairs] = strength * (frequency * offset).cos()
        tensors[f"{query}.bias"][start + half : start + half + pairs] = -strength * (frequency * offset).sin()
    for head in range(NUM_KV_HEADS):
        tensors[f"{key}.bias"][head * HEAD_DIM : head * HEAD_DIM + pairs] = strength
    tensors[f"{query}.weight"] *= 0.1
    tensors[f"{key}.weight"] *= 0.1
