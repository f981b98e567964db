"""Drawing tokens by ``elbowroom._native``: checks the tensor and turns it into an address, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom import _native


def sample(logits: Tensor, draws: bytes, positions: Sequence[int]) -> list[int]:
    """Return one token for each row of float32 logits ``[R, V]``; -1 where the greatest is not finite.

    Args:
        logits: rows on the CPU with adjacent elements.
        draws: R records laid out as ``Draw`` in native/sampling.h.
        positions: the third key of each row's random number.

    Raises:
        ValueError: dtype, shape or strides are wrong, or there are not R records and positions.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_cpu or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 rows [R, V] on the CPU, got {logits.dtype} {tuple(logits.shape)}")
    if logits.shape[0] != len(positions):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(positions)} positions")
    return _native.sample(logits.data_ptr(), logits.stride(0), logits.shape[1], draws, positions)
