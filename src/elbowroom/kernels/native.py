"""Attention over strips by ``elbowroom._native``: turns tensors into addresses and strides, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom import _native
from elbowroom.core import DTYPE_BYTES, LayerSpec, PageFormat
from elbowroom.kernels import reference
from elbowroom.kernels.base import StripLayout, StripStep, StripTable

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_TORCH_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
FORMATS = {"plain": 0, "int8": 1, "fp8": 2, "bfp": 3}
"""Formats that are read and written here, with their numbers; of others the readable path takes care."""


class NativeKernels:
    """Calls the C++ kernels, which release the GIL and use their own thread pool."""

    def append(
        self,
        step: StripStep,
        table: StripTable,
        base: Tensor,
        fmt: PageFormat,
        layout: StripLayout,
        k: Tensor,
        v: Tensor,
    ) -> None:
        """Write rows to their strips."""
        if fmt.codec not in FORMATS:
            reference.KERNELS.append(step, table, base, fmt, layout, k, v)
            return
        _native.append(step.num_sequences, step.addresses, strips_tuple(table, base, fmt), _rows(k), _rows(v))

    def attend(
        self,
        step: StripStep,
        table: StripTable,
        base: Tensor,
        fmt: PageFormat,
        layout: StripLayout,
        spec: LayerSpec,
        q: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write attention to ``out`` and return lse, float32 ``[N, Hq]``."""
        if fmt.codec not in FORMATS:
            return reference.KERNELS.attend(step, table, base, fmt, layout, spec, q, out)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        strips = strips_tuple(table, base, fmt)
        _native.attend(
            step.num_sequences, step.addresses, strips, spec_tuple(spec), _rows(q), _rows(out), lse.data_ptr()
        )
        return lse


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x [M, K] @ weight [N, K].T + bias`` in float32; weights may be float32, bfloat16 or float16.

    Raises:
        ValueError: a shape, dtype or stride is wrong.
    """
    if x.dtype != torch.float32 or x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"cannot multiply {x.dtype} {tuple(x.shape)} with weights {tuple(weight.shape)}")
    if not x.is_contiguous() or weight.stride(1) != 1 or weight.dtype not in _TORCH_CODES:
        raise ValueError(f"activations must be contiguous, weights float with adjacent columns, got {weight.dtype}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1]):
        raise ValueError(f"the bias must be float32 [{weight.shape[0]}], got {bias.dtype} {tuple(bias.shape)}")
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    row_bytes = weight.stride(0) * weight.element_size()
    bias = None if bias is None else bias.contiguous()  # kept until the call returns
    address = 0 if bias is None else bias.data_ptr()
    matrix = (weight.data_ptr(), *weight.shape, row_bytes, _TORCH_CODES[weight.dtype], address)
    _native.multiply(matrix, x.data_ptr(), x.shape[0], out.data_ptr())
    return out


def spec_tuple(spec: LayerSpec) -> _native.Spec:
    """Return a layer's attention as C++ takes it."""
    return spec.num_q_heads, spec.window or 0, spec.scale, spec.softcap or 0.0


def strips_tuple(table: StripTable, base: Tensor, fmt: PageFormat) -> _native.Strips:
    """Return the place of a layer's strips as C++ takes it."""
    kind, plain_bits = FORMATS[fmt.codec], 8 * DTYPE_BYTES.get(fmt.dtype, 0)
    return (
        table.__array_interface__["data"][0],
        table.shape[1],
        base.data_ptr(),
        base.numel(),
        DTYPE_CODES.get(fmt.dtype, 0),
        fmt.num_kv_heads,
        fmt.head_dim,
        fmt.v_head_dim,
        (kind, fmt.key_bits or plain_bits, fmt.block),
        (kind, fmt.value_bits or plain_bits, fmt.block),
    )


def _rows(x: Tensor) -> _native.Rows:
    return x.data_ptr(), _TORCH_CODES[x.dtype], x.stride(0), x.stride(1)


KERNELS = NativeKernels()
