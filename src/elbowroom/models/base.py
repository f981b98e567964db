"""The seam between the decoder and whoever holds the keys and values: AttentionContext.

An engine step and the dense causal context of training both implement it, so there is one decoder.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from elbowroom.kernels import LayerStrips
from elbowroom.models.config import ModelConfig


class AttentionContext(Protocol):
    """What one forward pass needs beside tokens: their positions, and attention over everything before them."""

    @property
    def positions(self) -> Tensor:
        """int64 ``[N]``: the position of each token of the pass in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append ``k, v [N, Hkv, D]`` of ``layer`` and return attention of ``q [N, Hq, D]`` as ``[N, Hq, Dv]``."""

    def strips(self, layer: int) -> LayerStrips | None:
        """Return where the layer's keys and values lie when appending is all they need, else None.

        Who gets strips may append and attend in them by itself, and then calls neither ``attend`` nor ``end_layer``.
        """

    def end_layer(self, layer: int) -> None:
        """Called once ``layer`` has no further use for its keys and values in this pass."""


class StepModel(Protocol):
    """A model that runs the passes of an engine."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    def runs_on_torch(self, num_tokens: int) -> bool:
        """Return whether a pass of so many tokens wants torch's threads; else torch should keep to one."""

    def step(self, tokens: Tensor, context: AttentionContext, rows: Tensor, scratch: Scratch) -> Tensor:
        """Run a pass and return the logits ``[M, V]`` of some of its tokens.

        Args:
            tokens: int64 ``[N]``.
            context: positions, keys and values.
            rows: int64 ``[M]``, which of the N tokens.
            scratch: where large activations and the logits live.
        """


class Scratch(Protocol):
    """Where a pass takes its large activations from."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a buffer that stays valid until ``name`` is taken again; None lets torch allocate (training)."""


class TorchScratch:
    """Scratch for training and tests: torch allocates every activation."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return None."""
        return None
