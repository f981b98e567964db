"""Shape and initial weights of the built-in model, and the attention context of its training.

The initial weights hold previous-token heads: in layer 0 the ``NUM_BUILT_IN`` fastest rotary pairs get a key bias
``(c, 0)`` and query head ``h`` the query bias ``(c cos(w o), -c sin(w o))``, so that its score peaks at distance
``o = offsets[h]`` whatever the tokens are. Induction (find an earlier copy of the last tokens, read what followed)
then needs one more layer only, which is learnt within half a million tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, RopeSpec
from elbowroom.kernels.rope import inverse_frequencies
from elbowroom.models.config import ModelConfig
from elbowroom.models.dense import DenseContext

HIDDEN, FFN_WIDTH, NUM_LAYERS, VOCAB_SIZE, MAX_POSITIONS = 192, 512, 6, 2048, 4096
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
ROPE = RopeSpec(theta=500_000.0)
NUM_BUILT_IN = 10
"""Rotary pairs that carry a built-in previous-token head."""
BUILT_IN_STRENGTH = 6.5
OFFSETS = (1, 2, 3, 4)
"""Distance in tokens that each query head of layer 0 reads at the start of training."""


def tied_config() -> ModelConfig:
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


def untied_config() -> ModelConfig:
    """Return the shape as exported: a plain Qwen2 with separate input and output embeddings."""
    return replace(tied_config(), tie_embeddings=False, embed_scale=1.0)


def initial_tensors(seed: int, offsets: Sequence[int] = OFFSETS) -> dict[str, Tensor]:
    """Return random float32 weights with built-in previous-token heads in layer 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tied_config().tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape) if "norm" in name else torch.zeros(shape)
            continue
        std = shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= (2 * NUM_LAYERS) ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * std
    _build_previous_token_heads(tensors, offsets)
    return tensors


def _build_previous_token_heads(tensors: dict[str, Tensor], offsets: Sequence[int]) -> None:
    pairs, strength, half = NUM_BUILT_IN, BUILT_IN_STRENGTH, HEAD_DIM // 2
    frequency = inverse_frequencies(ROPE, HEAD_DIM)[0][:pairs]
    query, key = "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"
    group = NUM_Q_HEADS // NUM_KV_HEADS
    for head, offset in enumerate(offsets):
        start, kv_start = head * HEAD_DIM, head // group * HEAD_DIM
        tensors[f"{query}.bias"][start : start + pairs] = strength * (frequency * offset).cos()
        tensors[f"{query}.bias"][start + half : start + half + pairs] = -strength * (frequency * offset).sin()
        tensors[f"{query}.weight"][start : start + HEAD_DIM] *= 0.1
        tensors[f"{key}.bias"][kv_start : kv_start + pairs] = strength
    for kv_head in {head // group for head in range(len(offsets))}:
        tensors[f"{key}.weight"][kv_head * HEAD_DIM : (kv_head + 1) * HEAD_DIM] *= 0.1


class SkipContext(DenseContext):
    """Dense causal attention whose rows may jump positions (PoSE, arXiv 2309.10400).

    Args:
        layers: shape of every layer.
        positions: int64 ``[B, T]``, increasing along T.
    """

    def __init__(self, layers: Sequence[LayerSpec], positions: Tensor) -> None:
        super().__init__(layers, *positions.shape)
        self._positions = positions.reshape(-1)
