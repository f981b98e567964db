"""Attention over strips by ``elbowroom._native``: turns tensors into addresses and strides, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom import _native
from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import StripStep, StripTable

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STORED_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}


class NativeKernels:
    """Calls the C++ kernels, which release the GIL and use their own thread pool."""

    def append(self, step: StripStep, table: StripTable, base: Tensor, fmt: PageFormat, k: Tensor, v: Tensor) -> None:
        """Write rows to their strips."""
        _native.append(step.num_sequences, step.addresses, _strips(table, base, fmt), _rows(k), _rows(v))

    def attend(
        self, step: StripStep, table: StripTable, base: Tensor, fmt: PageFormat, spec: LayerSpec, q: Tensor, out: Tensor
    ) -> Tensor:
        """Write attention to ``out`` and return lse, float32 ``[N, Hq]``."""
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        layer = (spec.num_q_heads, spec.window or 0, spec.scale, spec.softcap or 0.0)
        strips = _strips(table, base, fmt)
        _native.attend(step.num_sequences, step.addresses, strips, layer, _rows(q), _rows(out), lse.data_ptr())
        return lse


def _strips(table: StripTable, base: Tensor, fmt: PageFormat) -> tuple[int, int, int, int, int, int, int, int]:
    return (
        table.__array_interface__["data"][0],
        table.shape[1],
        base.data_ptr(),
        base.numel(),
        _STORED_CODES[fmt.dtype],
        fmt.num_kv_heads,
        fmt.head_dim,
        fmt.v_head_dim,
    )


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), _DTYPE_CODES[x.dtype], x.stride(0), x.stride(1)


KERNELS = NativeKernels()
