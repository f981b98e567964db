"""DenseContext: differentiable causal attention over a rectangular batch; training's AttentionContext."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kernels import LayerStrips


class DenseContext:
    """Causal attention among the tokens of one pass, nothing cached; also the oracle of the paged path.

    Args:
        layers: shape of every layer.
        batch: rows B of the pass; tokens are packed row after row, ``[B * T]``.
        length: tokens T of every row, positions ``0 .. T - 1``.
    """

    def __init__(self, layers: Sequence[LayerSpec], batch: int, length: int) -> None:
        self._layers, self._batch, self._length = layers, batch, length
        self._positions = torch.arange(length).repeat(batch)

    @property
    def positions(self) -> Tensor:
        """int64 ``[B * T]``."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention ``[B * T, Hq, Dv]``."""
        spec = self._layers[layer]
        q, k, v = (x.view(self._batch, self._length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if spec.softcap is None:
            mask = None if spec.window is None else self._window_mask(spec.window)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scale, enable_gqa=True
            )
        else:
            out = self._softcapped(spec, q, k, v)
        return out.transpose(1, 2).reshape(self._batch * self._length, spec.num_q_heads, spec.v_head_dim)

    def strips(self, layer: int) -> LayerStrips | None:
        """Return None: nothing is stored."""
        return None

    def end_layer(self, layer: int) -> None:
        """Nothing is cached."""

    def _window_mask(self, window: int | None) -> Tensor:
        distance = torch.arange(self._length)[:, None] - torch.arange(self._length)[None, :]
        mask = distance >= 0
        return mask if window is None else mask & (distance < window)

    def _softcapped(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cap = spec.softcap or 1.0
        k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
        scores = torch.tanh(q @ k.transpose(-1, -2) * spec.scale / cap) * cap
        scores = scores.masked_fill(~self._window_mask(spec.window), float("-inf"))
        return scores.softmax(dim=-1) @ v
