"""Workspace: named scratch buffers, sized once for the largest step and charged at start."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from elbowroom.errors import BudgetError, IntegrityError
from elbowroom.memory.arena import Arena

_ALIGN = 64


class Workspace:
    """Buffers for activations, logits and loading, so that a step allocates nothing large.

    Args:
        arena: where the bytes are charged (owner ``workspace``).
        sizes: buffer name -> bytes of its largest use.

    Raises:
        OutOfBudget: the buffers do not fit; nothing is held then.
    """

    def __init__(self, arena: Arena, sizes: Mapping[str, int]) -> None:
        self._slots: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, size in sizes.items():
            self._slots[name] = (offset, size)
            offset += -(-size // _ALIGN) * _ALIGN
        self._range = arena.reserve(max(offset, 1), "workspace")
        try:
            self._range.commit(np.zeros(1, dtype=np.int64), max(offset, 1))
        except BudgetError:
            self._range.close()
            raise

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer ``name`` viewed as ``shape``; its old content is lost.

        Raises:
            IntegrityError: the use is larger than planned (the planner of the step sizes is wrong), or not planned.
        """
        start, size = self._slots.get(name, (0, -1))
        if size < 0:
            raise IntegrityError(f"no workspace buffer {name!r}; there are: {', '.join(self._slots)}")
        needed = math.prod(shape) * dtype.itemsize
        if needed > size:
            raise IntegrityError(f"workspace buffer {name!r} holds {size} bytes, the step needs {needed}")
        return self._range.base[start : start + needed].view(dtype).view(shape)

    @property
    def num_bytes(self) -> int:
        """Bytes charged."""
        return self._range.live_bytes

    def close(self) -> None:
        """Give the buffers back."""
        self._range.close()
