"""Magnitudes of key channels over plain text: the order in which a block floating point codec sorts them."""

from __future__ import annotations

import torch

from elbowroom.core import LayerSpec
from elbowroom.evals.calibration.reader import LayerSight


class KeyMagnitudes:
    """Root mean squares of rotated keys.

    Args:
        layers: shape of every layer.
    """

    def __init__(self, layers: tuple[LayerSpec, ...]) -> None:
        shapes = [(spec.num_kv_heads, spec.head_dim) for spec in layers]
        self._sums = [torch.zeros(*shape, dtype=torch.float64) for shape in shapes]
        self.num_tokens = 0

    def look(self, sight: LayerSight) -> None:
        """Count the keys of a pass."""
        self._sums[sight.layer] += sight.written.float().square().sum(0)
        self.num_tokens += sight.written.shape[0] * (sight.layer == 0)

    def rms(self) -> list[list[list[float]]]:
        """Return ``[layers][Hkv][Dk]``; needs a pass."""
        return [(each / self.num_tokens).sqrt().tolist() for each in self._sums]
