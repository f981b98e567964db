"""Attention over strips, by the fastest backend that is there; every call is checked here, before any native code.

``ELBOWROOM_KERNELS`` names a backend; left unset, it is ``native`` when ``elbowroom._native`` was built, else
``reference``. ``triton`` reads plain strips, in the memory of a GPU or interpreted.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import AttentionKernels, LayerStrips, StripStep, StripTable, check_rows, check_strips
from elbowroom.registry import Registry

__all__ = ["BACKENDS", "StripStep", "StripTable", "append", "attend", "backend_name"]

BACKENDS: Registry[AttentionKernels] = Registry(
    "attention backend",
    {
        "native": "elbowroom.kernels.native:KERNELS",
        "reference": "elbowroom.kernels.reference:KERNELS",
        "triton": "elbowroom.kernels.triton_attention:KERNELS",
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


def append(strips: LayerStrips, k: Tensor, v: Tensor, *, backend: AttentionKernels | None = None) -> None:
    """Write the keys and values of a step's rows into their strips, and seal the strips that the step fills.

    Args:
        strips: the step and where its sequences lie in this layer.
        k: float ``[N, Hkv, Dk]``, any strides with the last one 1.
        v: float ``[N, Hkv, Dv]``, likewise.
        backend: None means the one of ``backend_name()``.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or a strip lies outside its range.
    """
    check_strips(strips)
    rows, fmt, device = strips.step.num_rows, strips.open_fmt, strips.base.device
    check_rows("k", k, (rows, fmt.num_kv_heads, fmt.head_dim), device)
    check_rows("v", v, (rows, fmt.num_kv_heads, fmt.v_head_dim), device)
    (backend or _backend()).append(strips, k, v)


def attend(
    strips: LayerStrips,
    spec: LayerSpec,
    q: Tensor,
    out: Tensor | None = None,
    *,
    backend: AttentionKernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Return causal attention of each row over the stored slots of its sequence; arithmetic is float32.

    The row at position p reads the slots s with ``max(first_slot, p - window + 1) <= s <= p`` and ``s < length``;
    query head h reads KV head ``h // group_size``. With a tail, a row reads its own block there and earlier ones
    sealed. Rows of a ``Selection`` read some blocks of that; a layer with a window has none. Products with integer
    codes (int8, bfp and what is sealed) are exact in integers and take queries and weights rounded to 16 bits where
    codes have 8, to 8 bits where they have fewer, each row by itself whatever the step; reading back what was encoded
    in float32 is the other backend's way.

    Args:
        strips: as in ``append``; the step's own tokens must have been appended.
        spec: heads, scale, window and softcap of the layer.
        q: float ``[N, Hq, Dk]``, any strides with the last one 1.
        out: ``[N, Hq, Dv]`` in the dtype of q, likewise; allocated when None.
        backend: None means the one of ``backend_name()``.

    Returns:
        ``out``, and the natural log of each softmax denominator, float32 ``[N, Hq]``.

    Raises:
        ValueError: a shape, dtype or stride is wrong, or a strip lies outside its range.
    """
    check_strips(strips)
    rows, fmt, device = strips.step.num_rows, strips.open_fmt, strips.base.device
    _check_spec(spec, fmt)
    if strips.selection is not None and spec.window is not None:
        raise ValueError(f"rows cannot select what they read of a layer with a window of {spec.window}")
    check_rows("q", q, (rows, spec.num_q_heads, fmt.head_dim), device)
    if out is None:
        out = torch.empty(rows, spec.num_q_heads, fmt.v_head_dim, dtype=q.dtype, device=device)
    else:
        check_rows("out", out, (rows, spec.num_q_heads, fmt.v_head_dim), device)
        if out.dtype != q.dtype:
            raise ValueError(f"out must have the dtype of q, {q.dtype}, got {out.dtype}")
    return out, (backend or _backend()).attend(strips, spec, q, out)


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
