"""Attention over strips, by the fastest backend that is there; every call is checked here, before any native code.

``ELBOWROOM_KERNELS`` names a backend; left unset, it is ``native`` when ``elbowroom._native`` was built, else
``reference``.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import (
    PLAIN,
    AttentionKernels,
    StripLayout,
    StripStep,
    StripTable,
    check_rows,
    check_strips,
)
from elbowroom.registry import Registry

__all__ = ["BACKENDS", "StripStep", "StripTable", "append", "attend", "backend_name"]

BACKENDS: Registry[AttentionKernels] = Registry(
    "attention backend",
    {
        "native": "elbowroom.kernels.native:KERNELS",
        "reference": "elbowroom.kernels.reference:KERNELS",
    },
)
"""Name -> backend object; each is imported when first asked for."""


@functools.cache
def backend_name() -> str:
    """Return the name of the backend that this process uses."""
    chosen = os.environ.get("ELBOWROOM_KERNELS")
    if chosen:
        return chosen
    return "native" if importlib.util.find_spec("elbowroom._native") is not None else "reference"


@functools.cache
def _backend() -> AttentionKernels:
    return BACKENDS.get(backend_name())


def append(
    step: StripStep,
    table: StripTable,
    base: Tensor,
    fmt: PageFormat,
    k: Tensor,
    v: Tensor,
    *,
    layout: StripLayout = PLAIN,
    backend: AttentionKernels | None = None,
) -> None:
    """Write the keys and values of a step's rows into their strips.

    Args:
        step: rows and sequences.
        table: uint32 ``[R, blocks]``, offsets of the strips of this layer in 64-byte units.
        base: uint8 ``[bytes]``, the range that holds the strips.
        fmt: layout of a strip.
        k: float ``[N, Hkv, Dk]``, any strides with the last one 1.
        v: float ``[N, Hkv, Dv]``, likewise.
        layout: how tokens lie in strips of ``fmt``.
        backend: None means the one of ``backend_name()``.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or a strip lies outside ``base``.
    """
    check_strips(step, table, base, fmt)
    check_rows("k", k, (step.num_rows, fmt.num_kv_heads, fmt.head_dim))
    check_rows("v", v, (step.num_rows, fmt.num_kv_heads, fmt.v_head_dim))
    (backend or _backend()).append(step, table, base, fmt, layout, k, v)


def attend(
    step: StripStep,
    table: StripTable,
    base: Tensor,
    fmt: PageFormat,
    spec: LayerSpec,
    q: Tensor,
    out: Tensor | None = None,
    *,
    layout: StripLayout = PLAIN,
    backend: AttentionKernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Return causal attention of each row over the stored slots of its sequence; arithmetic is float32.

    The row at position p reads the slots s with ``max(first_slot, p - window + 1) <= s <= p`` and ``s < length``;
    query head h reads KV head ``h // group_size``.

    Args:
        step, table, base, fmt, layout: as in ``append``; the step's own tokens must have been appended.
        spec: heads, scale, window and softcap of the layer.
        q: float ``[N, Hq, Dk]``, any strides with the last one 1.
        out: ``[N, Hq, Dv]`` in the dtype of q, likewise; allocated when None.
        backend: None means the one of ``backend_name()``.

    Returns:
        ``out``, and the natural log of each softmax denominator, float32 ``[N, Hq]``.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or a strip lies outside ``base``.
    """
    check_strips(step, table, base, fmt)
    _check_spec(spec, fmt)
    check_rows("q", q, (step.num_rows, spec.num_q_heads, fmt.head_dim))
    if out is None:
        out = torch.empty(step.num_rows, spec.num_q_heads, fmt.v_head_dim, dtype=q.dtype)
    else:
        check_rows("out", out, (step.num_rows, spec.num_q_heads, fmt.v_head_dim))
        if out.dtype != q.dtype:
            raise ValueError(f"out must have the dtype of q, {q.dtype}, got {out.dtype}")
    return out, (backend or _backend()).attend(step, table, base, fmt, layout, spec, q, out)


def _check_spec(spec: LayerSpec, fmt: PageFormat) -> None:
    shape = (spec.num_kv_heads, spec.head_dim, spec.v_head_dim)
    stored = (fmt.num_kv_heads, fmt.head_dim, fmt.v_head_dim)
    if shape != stored:
        raise ValueError(f"the layer has (KV heads, head_dim, v_head_dim) {shape}, its strips {stored}")
    if spec.num_q_heads % spec.num_kv_heads or (spec.window is not None and spec.window < 1):
        raise ValueError(
            f"{spec.num_q_heads} query heads need a divisor as KV heads and a window >= 1, "
            f"got {spec.num_kv_heads} and {spec.window}"
        )
