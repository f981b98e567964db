"""Keys with outlier channels, as large models have them, in a model that computes the same function.

A few channels of every KV head are made large: their rows of W_k (and its bias) are multiplied by a power of two, the
same rows of W_q in every query head of the group divided by it. Both channels of a rotary pair go together, because
RoPE mixes them; where a norm stands between projection and RoPE, its weights are scaled instead, in all heads alike.
Products of powers of two are exact, so scores stay what they were to the last bit, and only what stores keys sees it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import ModelError
from elbowroom.models.config import ModelConfig
from elbowroom.models.hf_config import read_config

FACTOR = 16.0
NUM_PAIRS = 3
"""Rotary pairs of each KV head: of a head of 64 channels, 6 are large."""


def write_with_outliers(
    source: Path, directory: Path, factor: float = FACTOR, num_pairs: int = NUM_PAIRS, seed: int = 0
) -> Path:
    """Copy a model directory with one weight file to ``directory``, with outlier channels; return ``directory``.

    Args:
        source: Hugging Face layout.
        directory: made if it is not there.
        factor: a power of two, by which keys grow in the chosen channels.
        num_pairs: rotary pairs of each KV head that are chosen.
        seed: of the choice.

    Raises:
        ModelError: the weights lie in several files, or a norm of the model adds to its weights.
    """
    weights = source / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{source} has no model.safetensors", "give a model whose weights are one file")
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path != weights:
            shutil.copyfile(path, directory / path.name)
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    inject(tensors, read_config(source), factor, num_pairs, seed)
    save_file(tensors, directory / weights.name, metadata={"format": "pt"})
    note = {"outlier_channels": {"factor": factor, "pairs_per_kv_head": num_pairs, "seed": seed}}
    (directory / "outliers.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    return directory


def inject(tensors: dict[str, Tensor], config: ModelConfig, factor: float, num_pairs: int, seed: int) -> None:
    """Scale the weights of keys and queries in place.

    Args:
        tensors: weights by their names in Hugging Face files.
        config: of the model.
        factor: a power of two.
        num_pairs: rotary pairs of each KV head.
        seed: of the choice.

    Raises:
        ModelError: a norm of keys or queries adds something to its weights.
    """
    if config.qk_norm and config.norm_offset:
        raise ModelError(f"outlier channels cannot be made in {config.family}: its norms add to their weights")
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(config.layers):
        prefix = f"model.layers.{index}.self_attn"
        if config.qk_norm:
            scale = _channel_scales(layer, factor, num_pairs, generator, 1)[0]
            for part, by in (("k", scale), ("q", 1 / scale)):
                _scale(tensors, f"{prefix}.{part}_norm.weight", by)
            continue
        scales = _channel_scales(layer, factor, num_pairs, generator, layer.num_kv_heads)
        for part, by in (("k", scales), ("q", (1 / scales).repeat_interleave(layer.group_size, dim=0))):
            _scale(tensors, f"{prefix}.{part}_proj.weight", by.flatten()[:, None])
            if config.qkv_bias:
                _scale(tensors, f"{prefix}.{part}_proj.bias", by.flatten())


def _channel_scales(
    layer: LayerSpec, factor: float, num_pairs: int, generator: torch.Generator, num_heads: int
) -> Tensor:
    """Return ``[num_heads, D]``: ``factor`` in both channels of the chosen pairs, 1 elsewhere."""
    half = layer.head_dim // 2
    scales = torch.ones(num_heads, layer.head_dim)
    for row in scales:
        chosen = torch.randperm(half, generator=generator)[:num_pairs]
        row[chosen] = row[chosen + half] = factor
    return scales


def _scale(tensors: dict[str, Tensor], name: str, by: Tensor) -> None:
    tensors[name] = (tensors[name].float() * by).to(tensors[name].dtype)
