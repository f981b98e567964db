"""The seam between the decoder and the bytes of its weights: WeightProvider and its Linear handles.

The decoder names a logical matrix and gets a handle; which format, tier or device is behind it, the decoder
never learns. Providers decide only between steps (``begin``, ``end``, ``resize``), never in the middle of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Phase = Literal["prefill", "decode", "verify", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """What a provider may know of the coming step."""

    num_tokens: int
    phase: Phase
    adapter_ids: tuple[int, ...] | None = None
    """Adapter of every row of the step; None means no adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDescriptor:
    """Plain facts of one matrix for native code; its bytes stay there as long as the provider is not resized."""

    weight_address: int
    bias: Tensor | None
    out_features: int
    in_features: int
    row_stride_bytes: int
    format: str
    """Format name, e.g. ``float32`` or ``bfloat16``."""


class Linear(Protocol):
    """One logical matrix ``[out_features, in_features]`` with an optional bias."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x [M, in] @ W.T + b`` as ``[M, out]``, written to ``out`` when given."""

    def descriptor(self) -> LinearDescriptor | None:
        """Return the plain facts when the matrix is dense and stays in memory, else None."""


class FFN(Protocol):
    """The whole gated feed-forward block of a layer, so that sparse or fused providers can see it at once."""

    def __call__(self, x: Tensor, gate: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        """Return the block's output ``[M, d]`` for ``x [M, d]``; ``gate``, ``up`` are optional ``[M, f]`` buffers."""

    def descriptors(self) -> tuple[LinearDescriptor | None, ...] | None:
        """Return the plain facts of gate, up and down when the block is ``down(act(gate(x)) * up(x))``, else None."""


class WeightProvider(Protocol):
    """Gives the decoder its matrices and vectors."""

    def linear(self, name: str) -> Linear:
        """Return the handle of ``name`` (as in HF files, without ``model.`` and ``.weight``)."""

    def ffn(self, layer: int) -> FFN:
        """Return the handle of a layer's feed-forward block."""

    def vector(self, name: str) -> Tensor:
        """Return a small tensor such as a norm weight."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``[N, d]`` of int64 ``tokens [N]``."""

    def head(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits ``[M, vocab]`` of ``x [M, d]``."""

    def begin(self, step: StepInfo) -> None:
        """Called before a step; the provider may move bytes."""

    def end(self) -> None:
        """Called after a step."""

    def prefetch(self, layer: int) -> None:
        """Called one layer ahead of use."""

    def resize(self, target_bytes: int) -> int:
        """Try to hold at most ``target_bytes``, between steps only; return the bytes now held."""

    def resident_bytes(self) -> int:
        """Return the bytes now held."""
