"""Attention over strips by ``elbowroom._native``: turns tensors into addresses and strides, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom import _native
from elbowroom.core import DTYPE_BYTES, LayerSpec, PageFormat
from elbowroom.kernels import reference
from elbowroom.kernels.base import LayerStrips, Progress, StripTable
from elbowroom.kernels.extras import counts_at, extras_at, heads_at
from elbowroom.kernels.token_major import BY_TOKEN

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_TORCH_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
FORMATS = {"plain": 0, "int8": 1, "fp8": 2, "bfp": 3, "kivi": 4, "planes": 5}
"""Formats that are read and written here, with their numbers; of others the readable path takes care."""
_VALUES_OF_PLANES = {8: "int8", 4: "bfp"}


class NativeKernels:
    """Calls the C++ kernels, which release the GIL and use their own thread pool."""

    def append(self, strips: LayerStrips, k: Tensor, v: Tensor) -> None:
        """Write rows to their strips."""
        if not is_native(strips.fmt):
            reference.KERNELS.append(strips, k, v)
            return
        step = strips.step
        _native.append(step.num_sequences, step.addresses, strips_tuple(strips), tail_tuple(strips), _rows(k), _rows(v))

    def attend(self, strips: LayerStrips, spec: LayerSpec, q: Tensor, out: Tensor) -> Tensor:
        """Write attention to ``out`` and return lse, float32 ``[N, Hq]``."""
        if not is_native(strips.fmt):
            return reference.KERNELS.attend(strips, spec, q, out)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        count, addresses = strips.step.num_sequences, strips.step.addresses
        where = strips_tuple(strips), tail_tuple(strips), selection_tuple(strips)
        shares, rows = strips.shares, (_rows(q), _rows(out))
        _native.attend(count, addresses, *where, shares, spec_tuple(spec), *rows, lse.data_ptr())
        return lse


def is_native(fmt: PageFormat) -> bool:
    """Return whether strips of ``fmt`` are read and written here."""
    return fmt.codec in FORMATS and not (fmt.sealed and fmt.codec == "fp8")


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


def strips_tuple(strips: LayerStrips) -> _native.Strips:
    """Return the place of a layer's strips as C++ takes it."""
    order = strips.layout.order
    by_token = strips.layout is BY_TOKEN
    return _strips(strips.table, 0, strips.base, strips.fmt, 0 if order is None else order.data_ptr(), by_token)


def tail_tuple(strips: LayerStrips) -> _native.Tail | None:
    """Return the place of a layer's newest tokens as C++ takes it; None where strips are not sealed."""
    tail = strips.tail
    if tail is None:
        return None
    where = _strips(tail.table, _address(tail.first_blocks), tail.base, tail.fmt)
    open_from = 0 if tail.open_from is None else _address(tail.open_from)
    places = 0 if tail.places is None else _address(tail.places)
    return where, open_from, tail.seals, _address(tail.full), _address(tail.sealed), places


def selection_tuple(strips: LayerStrips) -> _native.Selection | None:
    """Return which rows read a part of their sequence as C++ takes it; None where all read everything."""
    selection = strips.selection
    if selection is None:
        return None
    rows = _address(selection.rows)
    if not isinstance(selection, Progress):
        return selection.num_blocks, rows, 0.0, 0.0, 0
    return 0, rows, selection.tau, selection.eps, 0 if strips.tally is None else _address(strips.tally)


def _strips(
    table: StripTable, first_blocks: int, base: Tensor, fmt: PageFormat, order: int = 0, by_token: bool = False
) -> _native.Strips:
    kind, plain_bits = FORMATS[fmt.codec], 8 * DTYPE_BYTES.get(fmt.dtype, 0)
    values = FORMATS[_VALUES_OF_PLANES[fmt.value_bits]] if fmt.codec == "planes" else kind
    return (
        _address(table),
        first_blocks,
        table.shape[1],
        base.data_ptr(),
        base.numel(),
        DTYPE_CODES.get(fmt.dtype, 0),
        fmt.stored_heads,
        fmt.key_channels or fmt.head_dim,
        fmt.v_head_dim,
        (kind, fmt.key_bits or plain_bits, fmt.block),
        (values, fmt.value_bits or plain_bits, 0 if values == FORMATS["int8"] else fmt.block),
        fmt.digest_bytes,
        order,
        *_extras(fmt),
        by_token,
    )


def _extras(fmt: PageFormat) -> tuple[int, int, int]:
    """Return the bytes of a strip at which its channels, its counts and its KV heads lie; 0: it has none."""
    channels, counts = extras_at(fmt) if fmt.key_channels else 0, counts_at(fmt) if fmt.counts else 0
    return channels, counts, heads_at(fmt) if fmt.kept_heads else 0


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _rows(x: Tensor) -> _native.Rows:
    return x.data_ptr(), _TORCH_CODES[x.dtype], x.stride(0), x.stride(1)


KERNELS = NativeKernels()
