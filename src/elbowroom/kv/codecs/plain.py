"""Codec ``plain``: keys and values as they are, in float32, bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import DTYPE_BYTES, STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kernels.base import PLAIN

_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT = {long: short for short, long in _LONG.items()}


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """Stores what the model computed.

    Args:
        dtype: ``fp32``, ``bf16``, ``fp16`` (or the long names, kept as the short ones); ``auto`` takes the model's
            dtype and is lossless.
    """

    dtype: str = "auto"
    name: ClassVar[str] = "plain"
    seals: ClassVar[bool] = False
    sorts: ClassVar[bool] = False
    order: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Take one spelling of the dtype, and refuse one that no kernel reads."""
        object.__setattr__(self, "dtype", _SHORT.get(self.dtype, self.dtype))
        if self.dtype != "auto" and self.dtype not in _LONG:
            raise PlanError(
                f"plain KV cannot be stored as {self.dtype!r}", "use plain(fp32), plain(bf16) or plain(fp16)"
            )

    @property
    def lossless(self) -> bool:
        """Whether reading gives back every bit that the model wrote, whatever the model's dtype."""
        return self.dtype in ("auto", "fp32")

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return K ``[Hkv, 64, D]`` then V ``[Hkv, 64, Dv]``.

        Raises:
            PlanError: the model's dtype is not one that KV can be stored in.
        """
        stored = _LONG.get(self.dtype, dtype)
        if stored not in DTYPE_BYTES:
            raise PlanError(f"plain KV cannot be stored as {stored!r}", "use plain(fp32), plain(bf16) or plain(fp16)")
        width = layer.num_kv_heads * (layer.head_dim + layer.v_head_dim)
        return PageFormat(
            codec=self.name,
            dtype=stored,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            payload_bytes=width * STRIP_TOKENS * DTYPE_BYTES[stored],
        )

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Copy rows to their slots, rounded to the stored dtype."""
        PLAIN.store(strip, fmt, slots, k, v)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return views of the strip's keys and values."""
        return PLAIN.open(strip, fmt)

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return what the digest says."""
        return PLAIN.bounds(strip, fmt)

    def fields(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, ...]:
        """Return the bytes of keys and of values."""
        return tuple(part.view(torch.uint8) for part in PLAIN.open(strip, fmt))
