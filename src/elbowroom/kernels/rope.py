"""Rotary position embedding: frequencies for every supported context extension, and the rotation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbowroom.core import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Return the angle step of every rotary pair and the factor on cos and sin.

    Args:
        spec: the layer's RoPE.
        head_dim: width of a head, even.

    Returns:
        float32 ``[head_dim / 2]`` in radians a token, and the attention factor (1.0 except for yarn).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    base = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return base / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(spec, base), 1.0
    if spec.kind == "yarn":
        return _yarn(spec, base, head_dim), yarn_attention_factor(spec)
    return base, 1.0


def _llama3(spec: RopeSpec, base: Tensor) -> Tensor:
    """Llama 3.1's rule: long wavelengths are divided by ``factor``, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / base
    smooth = spec.original_max_positions / wavelength - spec.low_freq_factor
    smooth = (smooth / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - smooth) * base / spec.factor + smooth * base


def _yarn(spec: RopeSpec, base: Tensor, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): blend by how often a pair turns in the original context."""

    def dimension(rotations: float) -> float:
        length = spec.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / spec.factor * ramp + base * (1 - ramp)


def yarn_attention_factor(spec: RopeSpec) -> float:
    """Return YaRN's factor on cos and sin: given, or 0.1 ln(factor) + 1 (with the mscale variants)."""
    if spec.attention_factor is not None:
        return spec.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * weight * math.log(spec.factor) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)


class RopeTable:
    """Computes cos and sin of one RopeSpec for the positions of a step."""

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self._frequencies, self._factor = inverse_frequencies(spec, head_dim)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each ``[N, 1, head_dim / 2]`` in ``dtype``, for int64 ``positions [N]``."""
        angles = positions[:, None].float() * self._frequencies.to(positions.device)
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x [N, H, D]`` rotated by ``cos, sin [N, 1, D / 2]`` (pairs are ``(i, i + D / 2)``)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def turned(keys: Tensor, by: Tensor, spec: RopeSpec) -> Tensor:
    """Return rotated keys as they would be elsewhere, float32 ``[n, D]``.

    Rotations add up, so a key moves from where it is whatever that place; factors on cos and sin stay in it.

    Args:
        keys: rotated keys of a head, ``[n, D]``.
        by: int64 ``[n]``, tokens by which each moves towards the end.
        spec: RoPE of their layer.
    """
    angles = by[:, None].float() * inverse_frequencies(spec, keys.shape[1])[0]
    return rotate(keys.float()[:, None], angles.cos()[:, None], angles.sin()[:, None])[:, 0]
