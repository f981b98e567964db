"""The seam between the decoder and whoever holds the keys and values: AttentionContext.

An engine step and the dense causal context of training both implement it, so there is one decoder.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class AttentionContext(Protocol):
    """What one forward pass needs beside tokens: their positions, and attention over everything before them."""

    @property
    def positions(self) -> Tensor:
        """int64 ``[N]``: the position of each token of the pass in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append ``k, v [N, Hkv, D]`` of ``layer`` and return attention of ``q [N, Hq, D]`` as ``[N, Hq, Dv]``."""

    def end_layer(self, layer: int) -> None:
        """Called once ``layer`` has no further use for its keys and values in this pass."""


class Scratch(Protocol):
    """Where a pass takes its large activations from."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a buffer that stays valid until ``name`` is taken again; None lets torch allocate (training)."""


class TorchScratch:
    """Scratch for training and tests: torch allocates every activation."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return None."""
        return None
